"""Control rounds over gloo between threads of one process: also ranks a round ahead learn which one is missing."""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import anyio
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.control import GlooControlGroup
from async_eplb.workers import ThreadWorkers

ROW = (1, 2, 3, 4)


class Counting:
    """A voter that takes part in so many rounds, and records their end."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds
        self.error: BrokenControlGroup | None = None

    def pause_s(self) -> float:
        return 0.0

    def ballot(self) -> Sequence[int]:
        return ROW

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        assert list(map(tuple, rows)) == [ROW] * 3
        self.left -= 1
        return self.left > 0

    def lose(self, error: BrokenControlGroup) -> None:
        self.error = error


def test_a_rank_that_is_ahead_learns_which_rank_is_missing(tmp_path: Path) -> None:
    """Rank 1 has given rank 0 its last row, and rank 2 none: both name rank 1, and not each other."""
    groups: dict[int, GlooControlGroup] = {}
    dying: list[ProcessGroupGloo] = []

    def connect(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), 3)  # type: ignore[attr-defined]
        if rank == 1:
            dying.append(ProcessGroupGloo(store, rank, 3, timedelta(seconds=20)))
        else:
            groups[rank] = GlooControlGroup(store, rank, 3, ThreadWorkers(), timeout_s=20.0)

    together([threading.Thread(target=connect, args=(rank,)) for rank in range(3)])
    voters = {rank: Counting(5) for rank in (0, 2)}

    def give_rank_0_a_row_and_die() -> None:
        group = dying.pop()
        row, received = torch.tensor(ROW), torch.empty(len(ROW), dtype=torch.int64)
        group.send([row], 0, 0).wait()  # type: ignore[attr-defined]
        group.recv([received], 0, 0).wait()  # type: ignore[attr-defined]

    together(
        [
            threading.Thread(target=give_rank_0_a_row_and_die),
            *(threading.Thread(target=anyio.run, args=(groups[rank].run, voters[rank])) for rank in (0, 2)),
        ]
    )
    for rank in (0, 2):
        error = voters[rank].error
        assert error is not None
        assert error.missing == (1,)
    assert voters[0].left == 4
    assert voters[2].left == 5


def test_a_round_that_waits_can_be_aborted(tmp_path: Path) -> None:
    """At once, from another thread, and without waiting for what other ranks have to say."""
    groups: dict[int, GlooControlGroup] = {}

    def connect(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), 2)  # type: ignore[attr-defined]
        groups[rank] = GlooControlGroup(store, rank, 2, ThreadWorkers(), timeout_s=60.0)

    together([threading.Thread(target=connect, args=(rank,)) for rank in range(2)])
    voter = Counting(1)
    waiting = threading.Thread(target=anyio.run, args=(groups[0].run, voter))
    begun_s = time.monotonic()
    waiting.start()
    waiting.join(0.1)
    groups[0].abort()
    waiting.join()
    assert voter.error is not None
    assert time.monotonic() - begun_s < 10


def together(threads: Sequence[threading.Thread]) -> None:
    """Run threads to their end."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
