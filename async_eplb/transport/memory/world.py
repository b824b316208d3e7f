"""The state that ranks in memory share: mail, control rounds, and which ranks are gone."""

import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

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


class Round:
    """One control round: the ballots so far, by rank."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.over = Event()
        """Set when all ballots are there, or cannot come any more."""


class MemoryWorld:
    """The state that the transports of a world share."""

    def __init__(self, num_ranks: int, schedule: MemorySchedule) -> None:
        self.num_ranks = num_ranks
        self.schedule = schedule
        self.random = random.Random(schedule.seed)  # noqa: S311 - repeatable delays, not secrets
        self.run_id = uuid.uuid4().hex
        self.weights: dict[int, ExpertWeights] = {}
        self.mail: dict[MessageKey, Mail] = {}
        self.rounds: dict[int, Round] = {}
        self.waits: list[tuple[CancelScope, frozenset[int]]] = []
        self.gone: set[int] = set()
        self.dead: set[int] = set()
        self.wakes: dict[int, Callable[[], None]] = {}
        """Ends the pause of a rank's control rounds."""
        self.num_turns = [0] * num_ranks
        """How many exchanges each rank has launched whose pulls are in turn."""
        self.turns: dict[tuple[int, int, int], Event] = {}
        self.texts: dict[str, str] = {}
        """What ranks have left for each other."""
        self._replacements: dict[int, MemoryWorld] = {}

    def require_open(self, rank: int) -> None:
        """Raise BrokenTransport unless a rank has opened its transport, and neither closed nor aborted it."""
        if rank not in self.weights or rank in self.gone:
            raise BrokenTransport(f"the transport of rank {rank} is not open", rank=rank)

    @contextmanager
    def interruptible(self, ranks: frozenset[int]) -> Iterator[None]:
        """Run the body until one of ``ranks`` is gone, then raise BrokenTransport."""
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
        """End all waits for a rank that has closed its transport."""
        self.gone.add(rank)
        for scope, ranks in self.waits:
            if rank in ranks:
                scope.cancel()

    def die(self, rank: int) -> None:
        """Leave, and never answer in a round again."""
        self.dead.add(rank)
        self.leave(rank)
        for each in self.rounds.values():
            if rank not in each.rows:
                each.over.set()

        for world in self._replacements.values():
            world.die(rank)

    def replacement(self, number: int) -> "MemoryWorld":
        """Return the world of transports that replace this one's: with the same dead ranks, and no fault to come."""
        if number not in self._replacements:
            schedule = replace(self.schedule, faults=(), lost_results=frozenset())
            world = self._replacements[number] = MemoryWorld(self.num_ranks, schedule)
            world.run_id, world.dead, world.gone = self.run_id, set(self.dead), set(self.dead)
        return self._replacements[number]

    def turn(self, source: int, reader: int, number: int) -> Event:
        """Return the event of a reader's turn at a source."""
        return self.turns.setdefault((source, reader, number), Event())

    def mail_for(self, key: MessageKey) -> Mail:
        """Return a message, which is made for the side that asks first."""
        if key not in self.mail:
            self.mail[key] = Mail()
        return self.mail[key]

    def faults(self, key: MessageKey) -> list[Fault]:
        """Return the faults that the schedule has for a message."""
        src, dst, row, tag = key
        return [
            fault
            for fault in self.schedule.faults
            if (fault.src_rank, fault.dst_rank, fault.row) == (src, dst, row) and fault.tag in (None, tag)
        ]
