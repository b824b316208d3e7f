"""What ranks in memory share: mail, rounds, who is gone."""

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anyio import CancelScope, Event
from torch import Tensor

from async_eplb.errors import BrokenTransport
from async_eplb.transport.memory.schedule import Fault, MemorySchedule
from async_eplb.weights import ExpertWeights

CONNECT_TIMEOUTS = 4
"""Timeouts that the first round may take: other transports would wait for their peers when they open."""


MessageKey = tuple[int, int, int, int]


class Mail:
    """One message, known to whichever side posts first."""

    def __init__(self) -> None:
        self.posted = Event()
        self.delivered = Event()
        self.data: Tensor | None = None


class MemoryWorld:
    """What the transports of a world share."""

    def __init__(self, num_ranks: int, schedule: MemorySchedule) -> None:
        self.num_ranks = num_ranks
        self.schedule = schedule
        self.random = random.Random(schedule.seed)  # noqa: S311 - repeatable delays, not secrets
        self.run_id = uuid.uuid4().hex
        self.weights: dict[int, ExpertWeights] = {}
        self.mail: dict[MessageKey, Mail] = {}
        self.rounds: dict[int, dict[int, list[int]]] = {}
        self.complete: dict[int, Event] = {}
        self.waits: list[tuple[CancelScope, frozenset[int]]] = []
        self.gone: set[int] = set()
        self.dead: set[int] = set()
        self.wakes: dict[int, Callable[[], None]] = {}
        """How the pause of each rank's control rounds is ended."""
        self.num_turns = [0] * num_ranks
        """Exchanges that each rank has launched whose pulls are in turn."""
        self.turns: dict[tuple[int, int, int], Event] = {}

    @contextmanager
    def interruptible(self, ranks: frozenset[int]) -> Iterator[None]:
        """Let the body run until one of ``ranks`` is gone, then raise BrokenTransport."""
        with CancelScope() as scope:
            wait = (scope, ranks)
            self.waits.append(wait)
            try:
                if ranks & self.gone:
                    scope.cancel()
                yield
            finally:
                self.waits.remove(wait)
        if scope.cancelled_caught:
            gone = min(ranks & self.gone)
            raise BrokenTransport(f"rank {gone} has gone", rank=gone)

    def leave(self, rank: int) -> None:
        """End whatever waits for a rank that has closed its transport."""
        self.gone.add(rank)
        for scope, ranks in self.waits:
            if rank in ranks:
                scope.cancel()

    def die(self, rank: int) -> None:
        """Leave, and never answer in a round again."""
        self.dead.add(rank)
        self.leave(rank)
        for number, rows in list(self.rounds.items()):
            if rank not in rows:
                self.complete[number].set()

    def turn(self, source: int, reader: int, number: int) -> Event:
        """Return what happens when the reader's turn of this number has come."""
        return self.turns.setdefault((source, reader, number), Event())

    def mail_for(self, key: MessageKey) -> Mail:
        """Return the message, whichever side asks first."""
        if key not in self.mail:
            self.mail[key] = Mail()
        return self.mail[key]

    def faults(self, key: MessageKey) -> list[Fault]:
        """Return what the schedule does to a message."""
        src, dst, row, tag = key
        return [
            fault
            for fault in self.schedule.faults
            if (fault.src_rank, fault.dst_rank, fault.row) == (src, dst, row) and fault.tag in (None, tag)
        ]
