"""The command line: ``python -m async_eplb``."""

import argparse
import os
import sys
from collections.abc import Sequence

from async_eplb.cli import demo, events, fuzz, report, simulate
from async_eplb.errors import EplbError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 success, 1 a failed check, 2 invalid input."""
    parser = argparse.ArgumentParser(
        prog="async_eplb", description="Move the expert weights of a Mixture-of-Experts model while it serves."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, events, fuzz, report, simulate):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except EplbError as error:
        print(f"async_eplb: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        return 0
    except KeyboardInterrupt:
        print("async_eplb: interrupted", file=sys.stderr)
        return 130
    return status
