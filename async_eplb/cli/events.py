"""The reference of all events, printed."""

import argparse

from async_eplb.events.reference import event_reference


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``events`` to the command line."""
    parser = commands.add_parser("events", help="print what every logged event means", description=__doc__)
    parser.set_defaults(run=run)


def run(_options: argparse.Namespace) -> int:
    """Print the page."""
    print(event_reference(), end="")
    return 0
