"""The command ``events``: prints the reference of all log events."""

import argparse

from async_eplb.events.reference import event_reference

_DESCRIPTION = "Print the reference of all log events, as Markdown."


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``events`` to the command line."""
    parser = commands.add_parser("events", help="print what every logged event means", description=_DESCRIPTION)
    parser.set_defaults(run=run)


def run(_options: argparse.Namespace) -> int:
    """Print the reference."""
    print(event_reference(), end="")
    return 0
