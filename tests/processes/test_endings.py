"""A process ends when its main thread does, whatever is open (rule 20)."""

from itertools import product

import pytest
from support.endings import Ended, Ending, ends_of

pytestmark = pytest.mark.alone

ENDINGS = [
    *(Ending(*each) for each in product(("async", "sync"), ("return", "exception", "SIGTERM"), ("nothing", "updates"))),
    Ending("async with", "SIGTERM", "updates"),
    Ending("async with", "SIGTERM", "opening"),
    Ending("sync", "SIGTERM", "opening"),
    Ending("async", "return", "waits"),
]
ALONE = [Ending(updater, "return", "passes") for updater in ("async", "sync")]
"""Rank 1 goes on, and ends when it hears of the error."""
LIMIT_S = 2.0


@pytest.fixture(scope="module")
def ends() -> dict[Ending, list[Ended]]:
    """Return how the ranks of each ending ended: they share what it takes to begin."""
    endings = ENDINGS + ALONE
    return dict(zip(endings, ends_of(endings), strict=True))


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: f"{each.updater}, {each.how} amid {each.amid}")
def test_processes_end_with_their_main_threads(ends: dict[Ending, list[Ended]], ending: Ending) -> None:
    """On each rank, in time, and with the exit status that such an end has."""
    for ended in ends[ending]:
        assert ended.code == ending.code, ended.said
        assert ended.after_s < LIMIT_S


@pytest.mark.parametrize("ending", ALONE, ids=lambda each: each.updater)
def test_the_other_ranks_hear_of_it(ends: dict[Ending, list[Ended]], ending: Ending) -> None:
    """As of a rank that leaves: nothing is in doubt."""
    gone, remaining = ends[ending]
    assert (gone.code, remaining.code) == (0, 0)
    assert "UpdateAborted (0,)" in remaining.said or "UpdateCancelled (0,)" in remaining.said, remaining.said
