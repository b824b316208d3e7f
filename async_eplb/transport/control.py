"""Control rounds over a gloo group of their own, in a thread of their own."""

import json
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch
from torch.distributed import ProcessGroupGloo
from torch.distributed import Work as Transmission
from torch.distributed.distributed_c10d import Store

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.base import Voter
from async_eplb.transport.one_round import require_recent
from async_eplb.workers import Interruptible, Work, Workers

_SETTLE_S = 0.5
"""How much later than another a rank can notice a loss."""
_NEVER_SENT = 2**31 - 1
"""A tag of no message."""
_LEAST_WAIT_S = 0.005
"""For rows that are there already when the deadline has passed."""


class GlooControlGroup:
    """Gathers ballots of all ranks. It connects in the constructor, which blocks.

    :param store: where ranks find each other; nobody else may use its keys
    :param timeout_s: how long a round waits for the slowest rank
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, workers: Workers, *, timeout_s: float) -> None:
        self._store = store
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout_s))
        self._rank = rank
        self._num_ranks = num_ranks
        self._workers = workers
        self._timeout_s = timeout_s
        self._news = threading.Event()
        self._aborted = False
        self._unfinished: object = None
        """Memory that a broken round may still write to."""

    async def run(self, voter: Voter) -> None:
        """Run rounds in the control thread, from now until the last one."""
        await self._workers.run(Work.CONTROL, Interruptible(partial(self._hold_rounds, voter), self.abort))

    def wake(self) -> None:
        """End the pause before the next round."""
        self._news.set()

    def abort(self) -> None:
        """Close all connections, without a word to the other ranks. The round under way is lost, here and there."""
        self._aborted = True
        self._news.set()
        self._close_connections()

    def close(self) -> None:
        """Close all connections, whoever still has this object. No round is under way, and none follows."""
        self._group = None

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
        """Exchange rows with each rank by itself, so that the ranks of missing rows are known."""
        group = self._group
        if group is None:
            raise RuntimeError("the control group is closed")
        given = torch.tensor(row, dtype=torch.int64)
        rows = [given if rank == self._rank else torch.empty_like(given) for rank in range(self._num_ranks)]
        deadline = time.monotonic() + self._timeout_s
        failures: dict[int, RuntimeError] = {}
        recvs: list[tuple[int, Transmission]] = []
        sends: list[tuple[int, Transmission]] = []
        for peer in (rank for rank in range(self._num_ranks) if rank != self._rank):
            try:
                recvs.append((peer, group.recv([rows[peer]], peer, 0)))  # type: ignore[attr-defined]
                sends.append((peer, group.send([given], peer, 0)))  # type: ignore[attr-defined]
            except RuntimeError as error:
                failures[peer] = error
        failures |= _failures(recvs, deadline) or _failures(sends, deadline)
        if not failures:
            return [each.tolist() for each in rows]
        self._unfinished = (rows, recvs, sends)
        in_time = time.monotonic() < deadline - _SETTLE_S
        missing = [] if self._aborted else self._give_up(set(failures), in_time=in_time)
        raise BrokenControlGroup(
            f"rank {self._rank}: no ballot from ranks {missing} within {self._timeout_s} s: dead, cut off, or stopped "
            f"for that long ({next(iter(failures.values()))})",
            rank=self._rank,
            timeout_s=self._timeout_s,
            missing=tuple(missing),
        )

    def _give_up(self, silent: set[int], *, in_time: bool) -> list[int]:
        """Publish that this rank gives up; return the silent ranks that did not give up for want of another rank.

        A rank that is a round ahead waits for one that has given up already. So a rank writes to the store whose
        ballots it misses, and then closes its connections, which is noticed at once.

        :param in_time: whether the failure came before the deadline, so that ranks that gave up have written so by now
        """
        deadline = time.monotonic() + (_SETTLE_S / 10 if in_time else 2 * _SETTLE_S)
        missing: set[int] = set()
        try:
            self._store.set(f"gave up/{self._rank}", json.dumps(sorted(silent)))
            self._close_connections()
            looked_at = {self._rank}
            while silent - looked_at:
                peer = min(silent - looked_at)
                looked_at.add(peer)
                key = f"gave up/{peer}"
                while not (gave_up := self._store.check([key])) and time.monotonic() < deadline:
                    time.sleep(_LEAST_WAIT_S)
                if gave_up:
                    silent |= set(json.loads(self._store.get(key)))
                else:
                    missing.add(peer)
        except RuntimeError:  # the store went with its rank
            missing |= silent - {self._rank}
        return sorted(missing or silent - {self._rank})

    def _close_connections(self) -> None:
        group = self._group
        if group is not None:
            close_connections(group, [peer for peer in range(self._num_ranks) if peer != self._rank])


def close_connections(group: ProcessGroupGloo, peers: Iterable[int]) -> None:
    """Make gloo close all connections, as after a time-out; all waits on them end, here and at peers."""
    nothing = torch.empty(1)
    for peer in peers:
        with suppress(RuntimeError):
            group.recv([nothing], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))  # type: ignore[attr-defined]


def _failures(works: Sequence[tuple[int, Transmission]], deadline: float) -> dict[int, RuntimeError]:
    """Wait for works until a deadline; return the peers of those that failed."""
    failures: dict[int, RuntimeError] = {}
    for peer, work in works:
        try:
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), _LEAST_WAIT_S)))
        except RuntimeError as error:
            failures[peer] = error
    return failures
