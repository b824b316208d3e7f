"""RELIABILITY.md shows the table of outcomes as it is."""

import re
from enum import Enum
from pathlib import Path

from async_eplb.update.outcome import OUTCOMES

PAGE = Path(__file__).parents[2] / "RELIABILITY.md"


def test_the_table_of_outcomes_is_that_of_the_code() -> None:
    """Row by row, in order: the first cause that fits counts."""
    section = PAGE.read_text().partition("## How an update ends early")[2].partition("\n## ")[0]
    _, _, *rows = re.findall(r"^\|.*\|$", section, flags=re.MULTILINE)
    shown = [tuple(cell.strip().strip("`") for cell in row.strip("|").split("|")) for row in rows]
    assert shown == [
        (
            "any other error" if outcome.cause is Exception else outcome.cause.__name__,
            outcome.gives.name,
            outcome.peers.__name__,
            _words(outcome.stays),
            _words(outcome.then),
        )
        for outcome in OUTCOMES
    ]


def _words(member: Enum) -> str:
    return member.name.lower().replace("_", " ")
