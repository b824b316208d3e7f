"""Exchanges between ranks in memory: messages that peers post, and slots that are read from peers."""

from collections.abc import Sequence
from typing import TypeVar

import anyio
from anyio import fail_after
from torch import Tensor

from async_eplb.errors import BrokenTransport, TransferTimeout
from async_eplb.transport.copy_engine.turns import next_reader, sources_of
from async_eplb.transport.exchange import Exchange, Message, MessageGroup, Pull, Pulls, SlotMemory
from async_eplb.transport.memory.schedule import FaultKind
from async_eplb.transport.memory.world import MemoryWorld, MessageKey

T = TypeVar("T")


class PreparedInMemory:
    """An exchange of one rank that was not launched yet."""

    def __init__(self, world: MemoryWorld, rank: int, exchange: Exchange) -> None:
        self._world = world
        self._rank = rank
        self._exchange = exchange

    def launch(self) -> "MemoryExchange":
        """Return the exchange. Pulls in turn are numbered in the order of launches."""
        self._world.require_open(self._rank)
        kind = OneSidedExchange if self._world.schedule.launch_rule.needs_grant else MemoryExchange
        return kind(self._world, self._rank, self._exchange)


class MemoryExchange:
    """Messages of one exchange, delivered according to the schedule."""

    def __init__(self, world: MemoryWorld, rank: int, exchange: Exchange) -> None:
        self._world = world
        self._rank = rank
        self._row = exchange.row
        self._least_s = world.schedule.relay_s if exchange.hop else world.schedule.exchange_s
        self._groups = exchange.groups
        self._sends = [message for group in exchange.groups for message in group.sends]
        recvs = [message for group in exchange.groups for message in group.recvs]
        self._peers = frozenset(message.peer for message in (*recvs, *self._sends)) | {rank}

    def _send_key(self, message: Message) -> MessageKey:
        return (self._rank, message.peer, self._row, message.tag)

    def _recv_key(self, message: Message) -> MessageKey:
        return (message.peer, self._rank, self._row, message.tag)

    def _post(self, group: MessageGroup) -> None:
        for message in group.sends:
            mail = self._world.mail_for(self._send_key(message))
            mail.data = message.data
            mail.posted.set()

    async def start(self) -> None:
        """Do nothing: bytes move once the exchange is waited for."""

    async def wait(self, timeout_s: float) -> None:
        """Move the bytes."""
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


class OneSidedExchange(MemoryExchange):
    """Reads peers' slots whenever a pull is due, whether the peers have launched or are gone."""

    def __init__(self, world: MemoryWorld, rank: int, exchange: Exchange) -> None:
        if exchange.has_messages:
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
