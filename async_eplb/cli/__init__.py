"""The command line: ``python -m async_eplb``."""

import argparse
import sys
from collections.abc import Sequence

from async_eplb.cli import demo, fuzz
from async_eplb.errors import EplbError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 done but wrong, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="async_eplb", description="Move the expert weights of a Mixture-of-Experts model while it serves."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo.add_parser(commands)
    fuzz.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except EplbError as error:
        print(f"async_eplb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("async_eplb: interrupted", file=sys.stderr)
        return 130
    return status
