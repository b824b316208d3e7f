"""Types of numeric arguments."""

import argparse


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, at_least=1)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole(text, at_least=0)


def _whole(text: str, *, at_least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {at_least}")
    return value
