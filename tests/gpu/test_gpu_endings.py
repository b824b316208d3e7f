"""A process with a GPU ends when its main thread does, whatever is open (rule 20)."""

from itertools import product

import pytest
from support.endings import Ended, Ending, ends_of

ENDINGS = [
    Ending(*each, amid="updates", transport=transport, device="cuda")
    for transport in ("dist", "copy")
    for each in product(("async", "sync"), ("return", "exception", "SIGTERM"))
]
LIMIT_S = 2.0


@pytest.fixture(scope="module")
def ends() -> dict[Ending, list[Ended]]:
    """Return how the ranks of each ending ended: they share what it takes to begin."""
    return dict(zip(ENDINGS, ends_of(ENDINGS), strict=True))


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: f"{each.transport}: {each.updater}, {each.how}")
def test_processes_end_with_their_main_threads(ends: dict[Ending, list[Ended]], ending: Ending) -> None:
    """In the middle of an update, over NCCL and over the copy engine: in time, and with the right exit status."""
    for ended in ends[ending]:
        assert ended.code == ending.code, ended.said
        assert ended.after_s < LIMIT_S
