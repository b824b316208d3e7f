"""Control rounds over a gloo group of their own, in a thread of their own."""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import Store

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.base import Voter
from async_eplb.transport.one_round import require_recent
from async_eplb.workers import Workers

_LEAST_WAIT_S = 0.005
"""For rows that are there already when the deadline has passed."""


class GlooControlGroup:
    """Gathers ballots of all ranks. It connects in the constructor, which blocks.

    :param store: where ranks find each other; nobody else may use its keys
    :param timeout_s: how long a round waits for the slowest rank
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, workers: Workers, *, timeout_s: float) -> None:
        self._group = ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout_s))
        self._rank = rank
        self._num_ranks = num_ranks
        self._workers = workers
        self._timeout_s = timeout_s
        self._news = threading.Event()
        self._unfinished: object = None
        """What a broken round may still write to."""

    async def run(self, voter: Voter) -> None:
        """Hold rounds in the control thread, from now until the last one."""
        await self._workers.run("control", partial(self._hold_rounds, voter))

    def wake(self) -> None:
        """End the pause before the next round."""
        self._news.set()

    def _hold_rounds(self, voter: Voter) -> None:
        last_s = time.monotonic()
        try:
            while True:
                self._news.wait(voter.pause_s())
                self._news.clear()
                require_recent(time.monotonic() - last_s, self._rank, self._timeout_s)
                if not voter.receive(self._gather(voter.ballot())):
                    return
                last_s = time.monotonic()
        except BrokenControlGroup as error:
            voter.lose(error)

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        """Exchange rows with each rank by itself, so that it is known whose row is missing."""
        given = torch.tensor(row, dtype=torch.int64)
        rows = [given if rank == self._rank else torch.empty_like(given) for rank in range(self._num_ranks)]
        deadline = time.monotonic() + self._timeout_s
        failures: dict[int, RuntimeError] = {}
        works: list[tuple[int, Work]] = []
        for peer in (rank for rank in range(self._num_ranks) if rank != self._rank):
            try:
                works.append((peer, self._group.recv([rows[peer]], peer, 0)))  # type: ignore[attr-defined]
                works.append((peer, self._group.send([given], peer, 0)))  # type: ignore[attr-defined]
            except RuntimeError as error:
                failures[peer] = error
        for peer, work in works:
            try:
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), _LEAST_WAIT_S)))
            except RuntimeError as error:
                failures[peer] = error
        if failures:
            self._unfinished = (rows, works)
            raise BrokenControlGroup(
                f"rank {self._rank}: no ballot from ranks {sorted(failures)} within {self._timeout_s} s: dead, cut "
                f"off, or stopped for that long ({next(iter(failures.values()))})",
                rank=self._rank,
                timeout_s=self._timeout_s,
                missing=tuple(sorted(failures)),
            )
        return [gathered.tolist() for gathered in rows]
