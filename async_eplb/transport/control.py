"""Control rounds over a gloo group of their own, in a thread of their own."""

import threading
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.base import Voter
from async_eplb.workers import Workers


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

    async def run(self, voter: Voter) -> None:
        """Hold rounds in the control thread, from now until the last one."""
        await self._workers.run("control", partial(self._hold_rounds, voter))

    def wake(self) -> None:
        """End the pause before the next round."""
        self._news.set()

    def _hold_rounds(self, voter: Voter) -> None:
        try:
            while True:
                self._news.wait(voter.pause_s())
                self._news.clear()
                if not voter.receive(self._gather(voter.ballot())):
                    return
        except BrokenControlGroup as error:
            voter.lose(error)

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        given = torch.tensor(row, dtype=torch.int64)
        rows = [torch.empty_like(given) for _ in range(self._num_ranks)]
        try:
            work = self._group.allgather([rows], [given])  # type: ignore[attr-defined]
            work.wait()
        except RuntimeError as error:
            raise BrokenControlGroup(
                f"rank {self._rank}: a control round did not complete within {self._timeout_s} s; a rank is dead, "
                f"or its process was stopped for that long ({error})",
                rank=self._rank,
                timeout_s=self._timeout_s,
            ) from error
        return [gathered.tolist() for gathered in rows]
