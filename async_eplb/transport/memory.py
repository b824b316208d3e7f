"""A transport inside one event loop, for tests and simulation: real bytes, scheduled delays and faults."""

import random
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import anyio
from anyio import CancelScope, Event, fail_after
from torch import Tensor

from async_eplb.agreement import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenControlGroup, BrokenTransport, BusyTransport, TransferTimeout
from async_eplb.transport.base import (
    ControlGroup,
    Exchange,
    Message,
    MessageGroup,
    PendingExchange,
    Pull,
    Pulls,
    SlotMemory,
    Voter,
)
from async_eplb.transport.one_round import require_recent
from async_eplb.transport.turns import next_reader, sources_of
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

T = TypeVar("T")


class FaultKind(Enum):
    """What can happen to a message."""

    DROP = "drop"
    CORRUPT = "corrupt"
    DUPLICATE = "duplicate"
    """It is read from the sender and written to the receiver twice, before the exchange is over."""
    DELAY = "delay"


@dataclass(frozen=True, slots=True)
class Fault:
    """Every message from ``src_rank`` to ``dst_rank`` for ``row`` meets this fault.

    :param tag: only the message with this tag; all without it. Of what is pulled, a tensor of a slot has the tag
        ``dst_slot * tensors + tensor``
    :param delay_s: how late a delayed or duplicated message comes, in seconds
    """

    kind: FaultKind
    src_rank: int
    dst_rank: int
    row: int
    tag: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MemorySchedule:
    """What time a world takes and what goes wrong in it; equal schedules give equal runs.

    :param seed: of all random delays
    :param exchange_s: seconds that an exchange takes at least
    :param relay_s: the same of a second hop
    :param message_jitter_s: each message takes up to this many seconds more, at random
    :param reorder: messages of an exchange arrive in an order of their own, not in that in which they were posted
    :param control_s: seconds that a control round takes
    :param control_jitter_s: each rank has a round's result up to this many seconds later, at random
    :param lost_results: (rank, number of the round from 0): that rank does not hear what the round returned
    :param launch_rule: of the transports; granted ones are one-sided: receivers read peers' live weights themselves
    :param faults: what happens to messages
    """

    seed: int = 0
    exchange_s: float = 0.0
    relay_s: float = 0.0
    message_jitter_s: float = 0.0
    reorder: bool = False
    control_s: float = 0.0
    control_jitter_s: float = 0.0
    lost_results: frozenset[tuple[int, int]] = frozenset()
    launch_rule: LaunchRule = LaunchRule.AT_ONCE
    faults: tuple[Fault, ...] = ()


_CONNECT_TIMEOUTS = 4
"""Timeouts that the first round may take: other transports would wait for their peers when they open."""

_MessageKey = tuple[int, int, int, int]


class _Mail:
    """One message, known to whichever side posts first."""

    def __init__(self) -> None:
        self.posted = Event()
        self.delivered = Event()
        self.data: Tensor | None = None


class _World:
    """What the transports of a world share."""

    def __init__(self, num_ranks: int, schedule: MemorySchedule) -> None:
        self.num_ranks = num_ranks
        self.schedule = schedule
        self.random = random.Random(schedule.seed)  # noqa: S311 - repeatable delays, not secrets
        self.run_id = uuid.uuid4().hex
        self.weights: dict[int, ExpertWeights] = {}
        self.mail: dict[_MessageKey, _Mail] = {}
        self.rounds: dict[int, dict[int, list[int]]] = {}
        self.complete: dict[int, Event] = {}
        self.waits: list[tuple[CancelScope, frozenset[int]]] = []
        self.gone: set[int] = set()
        self.dead: set[int] = set()
        self.groups: dict[int, _MemoryControlGroup] = {}
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
        self.gone.add(rank)
        for scope, ranks in self.waits:
            if rank in ranks:
                scope.cancel()

    def die(self, rank: int) -> None:
        self.dead.add(rank)
        self.leave(rank)
        for number, rows in list(self.rounds.items()):
            if rank not in rows:
                self.complete[number].set()

    def turn(self, source: int, reader: int, number: int) -> Event:
        """Return what happens when the reader's turn of this number has come."""
        return self.turns.setdefault((source, reader, number), Event())

    def mail_for(self, key: _MessageKey) -> _Mail:
        if key not in self.mail:
            self.mail[key] = _Mail()
        return self.mail[key]

    def faults(self, key: _MessageKey) -> list[Fault]:
        src, dst, row, tag = key
        return [
            fault
            for fault in self.schedule.faults
            if (fault.src_rank, fault.dst_rank, fault.row) == (src, dst, row) and fault.tag in (None, tag)
        ]


class MemoryTransport:
    """One rank of a world inside this process; all ranks run in one event loop.

    Made by :meth:`world`. Bytes are copied when a message is delivered, so a sender that changes live weights too
    early is found out.
    """

    def __init__(self, world: _World, rank: int) -> None:
        self.launch_rule = world.schedule.launch_rule
        self._world = world
        self._rank = rank
        self._opened = False

    @classmethod
    def world(cls, num_ranks: int, schedule: MemorySchedule | None = None) -> "tuple[MemoryTransport, ...]":
        """Return the connected transports of a world, by rank."""
        world = _World(num_ranks, schedule or MemorySchedule())
        return tuple(cls(world, rank) for rank in range(num_ranks))

    def __repr__(self) -> str:
        return f"<MemoryTransport rank {self._rank} of {self.num_ranks}>"

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def num_ranks(self) -> int:
        """Ranks of the world."""
        return self._world.num_ranks

    @property
    def run_id(self) -> str:
        """Name of the world in logs."""
        return self._world.run_id

    @property
    def needs_ordered_launch(self) -> bool:
        """Whether the schedule says so."""
        return self.launch_rule.needs_order

    @property
    def one_sided_peers(self) -> frozenset[int]:
        """All others, if the schedule grants launches."""
        return frozenset(range(self.num_ranks) if self.launch_rule.needs_grant else ()) - {self._rank}

    async def open(
        self,
        device: Device,  # noqa: ARG002 - the world's time is its schedule's
        workers: Workers,  # noqa: ARG002
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        relay_peers: Collection[int] = (),  # noqa: ARG002
    ) -> ControlGroup:
        """Show this rank's weights to the world and return its control group; there is nothing to connect."""
        if self._opened:
            raise BusyTransport(f"{self!r} is in use; make one transport for each updater")
        self._opened = True
        self._world.weights[self._rank] = weights
        return _MemoryControlGroup(self._world, self._rank, control_timeout_s)

    def prepare(self, exchange: Exchange) -> None:
        """Allocate nothing."""

    def launch(self, exchange: Exchange) -> PendingExchange:
        """Offer this rank's messages to their peers."""
        if not self._opened or self._rank in self._world.gone:
            raise BrokenTransport(f"{self!r} is not open", rank=self._rank)
        kind = _OneSidedExchange if self.launch_rule.needs_grant else _MemoryExchange
        return kind(self._world, self._rank, exchange)

    def abort(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)

    def die(self) -> None:
        """Let peers see what they see when a process dies: all connections of this rank are closed."""
        self._world.die(self._rank)

    async def aclose(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)


class _MemoryExchange:
    def __init__(self, world: _World, rank: int, exchange: Exchange) -> None:
        self._world = world
        self._rank = rank
        self._row = exchange.row
        self._least_s = world.schedule.relay_s if exchange.hop else world.schedule.exchange_s
        self._groups = exchange.groups
        self._sends = [message for group in exchange.groups for message in group.sends]
        recvs = [message for group in exchange.groups for message in group.recvs]
        self._peers = frozenset(message.peer for message in (*recvs, *self._sends)) | {rank}

    def _send_key(self, message: Message) -> _MessageKey:
        return (self._rank, message.peer, self._row, message.tag)

    def _recv_key(self, message: Message) -> _MessageKey:
        return (message.peer, self._rank, self._row, message.tag)

    def _post(self, group: MessageGroup) -> None:
        for message in group.sends:
            mail = self._world.mail_for(self._send_key(message))
            mail.data = message.data
            mail.posted.set()

    async def start(self) -> None:
        pass

    async def wait(self, timeout_s: float) -> None:
        try:
            with self._world.interruptible(self._peers), fail_after(timeout_s):
                await anyio.sleep(self._least_s)
                await self._exchange()
        except TimeoutError as error:
            self._world.leave(self._rank)
            raise TransferTimeout(
                f"rank {self._rank}: row {self._row} was not exchanged within {timeout_s} s",
                rank=self._rank,
                layer=self._row,
                timeout_s=timeout_s,
            ) from error
        for message in self._sends:
            del self._world.mail[self._send_key(message)]

    async def _exchange(self) -> None:
        for group in self._groups:
            self._post(group)
            for message in self._in_order_of_arrival(group.recvs):
                await self._receive(message)
            for message in group.sends:
                await self._world.mail_for(self._send_key(message)).delivered.wait()

    def _in_order_of_arrival(self, entries: Sequence[T]) -> Sequence[T]:
        world = self._world
        return world.random.sample(entries, len(entries)) if world.schedule.reorder else entries

    async def _receive(self, message: Message) -> None:
        mail = self._world.mail_for(self._recv_key(message))
        await mail.posted.wait()
        await self._deliver(message, mail.data)
        mail.delivered.set()

    async def _deliver(self, message: Message, data: Tensor | None) -> None:
        await anyio.sleep(self._world.random.uniform(0, self._world.schedule.message_jitter_s))
        faults = self._world.faults(self._recv_key(message))
        kinds = {fault.kind for fault in faults}
        delay_s = max((fault.delay_s for fault in faults), default=0.0)
        if FaultKind.DROP in kinds or data is None:
            await anyio.sleep_forever()
            return
        if FaultKind.DUPLICATE in kinds:
            message.data.copy_(data)
        if delay_s:
            await anyio.sleep(delay_s)
        message.data.copy_(data)
        if FaultKind.CORRUPT in kinds:
            message.data[0] ^= 1


class _OneSidedExchange(_MemoryExchange):
    """Reads what peers have in their slots whenever a pull is due, whether they have launched, or have gone.

    What is tagged is a tensor of the slot that is written.
    """

    def __init__(self, world: _World, rank: int, exchange: Exchange) -> None:
        if any(group.sends or group.recvs for group in exchange.groups):
            raise BrokenTransport(f"rank {rank}: one-sided transports move no messages", rank=rank)
        super().__init__(world, rank, exchange)
        self._pulls = exchange.pulls
        self._turn = world.num_turns[rank]
        if self._pulls is not None and self._pulls.in_turn:
            world.num_turns[rank] += 1

    async def _exchange(self) -> None:
        pulls = self._pulls
        if pulls is not None and pulls.in_turn:
            await self._read_in_turn(pulls)
        elif pulls is not None:
            await self._read(self._in_order_of_arrival(pulls.slots), pulls.memory)

    async def _read_in_turn(self, pulls: Pulls) -> None:
        world, members = self._world, range(self._world.num_ranks)
        for place, source in enumerate(sources_of(self._rank, members)):
            if self._turn or place:
                await world.turn(source, self._rank, self._turn).wait()
            await self._read([pull for pull in pulls.slots if pull.peer == source], pulls.memory)
            reader, later = next_reader(self._rank, source, members)
            world.turn(source, reader, self._turn + later).set()

    async def _read(self, slots: Sequence[Pull], memory: SlotMemory) -> None:
        for peer, src_slot, dst_slot in slots:
            live = self._world.weights[peer].slot_views(self._row, src_slot)
            for tensor, data in enumerate(memory.views(dst_slot)):
                await self._deliver(Message(peer, dst_slot * len(live) + tensor, data), live[tensor])


class _MemoryControlGroup:
    def __init__(self, world: _World, rank: int, timeout_s: float) -> None:
        self._world = world
        self._rank = rank
        self._timeout_s = timeout_s
        self._round = 0
        self._news = Event()
        world.groups[rank] = self

    async def run(self, voter: Voter) -> None:
        last_s = anyio.current_time()
        try:
            while True:
                with anyio.move_on_after(voter.pause_s()):
                    await self._news.wait()
                require_recent(anyio.current_time() - last_s, self._rank, self._timeout_s)
                if not voter.receive(await self._gather(voter.ballot())):
                    return
                last_s = anyio.current_time()
        except BrokenControlGroup as error:
            voter.lose(error)

    def wake(self) -> None:
        self._news.set()

    async def _gather(self, row: Sequence[int]) -> list[list[int]]:
        world, number = self._world, self._round
        self._round += 1
        if number not in world.rounds:
            world.rounds[number], world.complete[number] = {}, Event()
        rows, complete = world.rounds[number], world.complete[number]
        rows[self._rank] = list(row)
        for rank, group in world.groups.items():
            if rank not in rows:
                group.wake()
        self._news = Event()
        if len(rows) == world.num_ranks:
            del world.rounds[number], world.complete[number]
            complete.set()
        if world.dead - set(rows):
            complete.set()
        patience = 1 if number else _CONNECT_TIMEOUTS
        with anyio.move_on_after(self._timeout_s * patience):
            await complete.wait()
        await anyio.sleep(world.schedule.control_s + world.random.uniform(0, world.schedule.control_jitter_s))
        lost = (self._rank, number) in world.schedule.lost_results
        if len(rows) < world.num_ranks or lost:
            missing = sorted(set(range(world.num_ranks)) - set(rows))
            reason = f"the result of round {number} was lost" if lost else f"no ballot from ranks {missing}"
            raise BrokenControlGroup(
                f"rank {self._rank}: {reason} within {self._timeout_s} s",
                rank=self._rank,
                timeout_s=self._timeout_s,
                missing=tuple(missing),
            )
        return [rows[rank] for rank in range(world.num_ranks)]
