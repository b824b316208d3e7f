"""A transport for GPUs of one host: receivers pull peers' live weights with plain copies. No kernels, no rendezvous.

Each rank exports the allocations that its live weights are in, once, when it opens; the others map them. A receive is
then a copy from the mapping to staging, behind the transfer stream, which goes on meanwhile. While the model serves, it
needs nothing of the peer but its earlier word that the layer may be read (:attr:`LaunchRule.GRANTED`). So it cannot
deadlock with anything that the model runs. While no rank serves, all take turns at what they read (:mod:`.turns`).
"""

import json
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from async_eplb.agreement import LaunchRule
from async_eplb.device import Device, DeviceEvent, until_passed
from async_eplb.errors import BrokenTransport, IpcUnavailable, TransferTimeout
from async_eplb.transport.base import ControlGroup, Exchange, PendingExchange, Pull, Pulls
from async_eplb.transport.cuda_ipc import Copies, CudaIpc, PeerMemory, Step
from async_eplb.transport.joining import Member
from async_eplb.transport.turns import Turns, sources_of
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

_CONNECT_TIMEOUT_S = 300.0
_CLOSE_TIMEOUT_S = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CopyEngineTransport(Member):
    """Moves weights between GPUs of one host by copies that receivers enqueue.

    Like all calls that concern a group, transports are constructed in the same order on all its ranks.
    Opening raises :class:`IpcUnavailable` on all ranks if any cannot read another's weights. Live weights may be
    freed when all ranks have closed their transports.

    :param group: the EP group, of which this process must be a member; the world without it. It is only used to find
        the other ranks
    :param within_host: leave out ranks of other hosts, instead of refusing them
    :param memory: what maps and copies memory of other processes, for the device of the weights
    :raises BrokenTransport: if this process is not in the group
    """

    launch_rule = LaunchRule.GRANTED
    needs_ordered_launch = False

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        within_host: bool = False,
        memory: Callable[[torch.device], PeerMemory] = CudaIpc,
    ) -> None:
        super().__init__(group)
        self._within_host = within_host
        self._make_memory = memory
        self._link: _Link | None = None

    def __repr__(self) -> str:
        return f"<CopyEngineTransport rank {self._rank} of {self._num_ranks}, {self._state}>"

    @property
    def one_sided_peers(self) -> frozenset[int]:
        """Ranks whose weights are mapped."""
        return frozenset() if self._link is None else self._link.peers

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        relay_peers: Collection[int] = (),  # noqa: ARG002 - what is in staging cannot be pulled
    ) -> ControlGroup:
        """Map the live weights of all other ranks.

        :raises IpcUnavailable: if a rank cannot read those of another, on every rank
        """
        self._become_open()
        return await workers.run("control", partial(self._connect, device, workers, weights, control_timeout_s))

    def _connect(
        self, device: Device, workers: Workers, weights: ExpertWeights, control_timeout_s: float
    ) -> ControlGroup:
        control = self._connect_control(workers, control_timeout_s)
        offer, failure = "", ""
        try:
            self._link = _Link(self._make_memory(device.torch_device), device, workers, self._rank, self._num_ranks)
            offer = self._link.offer(weights).to_json()
        except (RuntimeError, OSError) as error:
            failure = str(error)
        offers = self._gather("offer", offer)
        if self._link is not None and all(offers):
            try:
                self._link.map([Offer.from_json(each) for each in offers], within_host=self._within_host)
                self._link.warm_up()
            except RuntimeError as error:
                failure = str(error)
        failures = self._gather("failure", failure)
        if self._link is not None:
            self._link.turns.unlink()
        ranks = tuple(rank for rank, each in enumerate(failures) if each)
        if ranks:
            self._state = "broken"
            if self._link is not None:
                self._link.close()
                self._link = None
            reasons = "; ".join(f"rank {rank}: {failures[rank]}" for rank in ranks)
            raise IpcUnavailable(f"the copy engine cannot move weights between these ranks: {reasons}", ranks=ranks)
        return control

    def launch(self, exchange: Exchange) -> PendingExchange:
        """Prepare what an exchange pulls, which :meth:`PendingExchange.start` enqueues.

        :raises BrokenTransport: also if it has messages, which nobody would move
        """
        if self._link is None or self._state != "open":
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self._rank)
        if any(group.sends or group.recvs for group in exchange.groups):
            raise BrokenTransport(f"{self!r} pulls slots, and moves no messages", rank=self._rank)
        return _Pull(self, self._link, exchange)

    def abort(self) -> None:
        """Break the transport. Copies under way end by themselves, and wait for no turn.

        Peers that wait for a turn of this rank's that it had not enqueued do so until they break theirs.
        """
        self._state = "broken"
        if self._link is not None:
            self._link.hold_up()

    async def aclose(self) -> None:
        """Unmap the weights of all other ranks, and wait until they have unmapped this one's."""
        link, self._link = self._link, None
        self._become_closed()
        if link is not None:
            await link.workers.run("exchange", partial(self._close, link))

    def _close(self, link: "_Link") -> None:
        link.close()
        with suppress(RuntimeError):  # what dead ranks have mapped is gone with them
            self._gather("closed", "closed", timeout_s=_CLOSE_TIMEOUT_S)

    def _gather(self, what: str, value: str, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> list[str]:
        """Return the values of all ranks, which must all give one."""
        self._store.set(f"{what}/{self._rank}", value)
        keys = [f"{what}/{rank}" for rank in range(self._num_ranks)]
        self._store.wait(keys, timedelta(seconds=timeout_s))
        return [self._store.get(key).decode() for key in keys]


class _Pull:
    def __init__(self, transport: CopyEngineTransport, link: "_Link", exchange: Exchange) -> None:
        self._transport = transport
        self._link = link
        self._exchange = exchange
        self._started = False
        self._end: DeviceEvent | None = None

    async def start(self) -> None:
        self._started = True
        await self._in_thread("pull", self._enqueue)

    async def wait(self, timeout_s: float) -> None:
        if not self._started:
            await self.start()
        try:
            await self._in_thread("exchange", partial(self._finish, time.monotonic() + timeout_s))
        except TimeoutError as error:
            self._transport.abort()
            raise TransferTimeout(
                f"{self._where}: the copies did not finish within {timeout_s} s",
                rank=self._transport.rank,
                layer=self._exchange.row,
                timeout_s=timeout_s,
            ) from error

    @property
    def _where(self) -> str:
        return f"rank {self._transport.rank}, row {self._exchange.row}"

    async def _in_thread(self, kind: str, function: Callable[[], None]) -> None:
        try:
            await self._link.workers.run(kind, function)
        except RuntimeError as error:
            self._transport.abort()
            raise BrokenTransport(f"{self._where}: {error}", rank=self._transport.rank) from error

    def _enqueue(self) -> None:
        if self._transport._state != "open":
            raise RuntimeError(f"{self._transport!r} cannot move anything")
        self._end = self._link.pull(self._exchange)

    def _finish(self, deadline: float) -> None:
        try:
            until_passed(self._end or self._link.end, deadline)
        except TimeoutError:
            self._link.turns.release()  # from this thread: the event loop may be waiting for the device
            raise
        if self._end is None or self._transport._state != "open":
            raise RuntimeError(f"{self._transport!r} did not move everything")


@dataclass(frozen=True, slots=True)
class Offer:
    """What one rank lets others read.

    :param host: equal for processes of one host
    :param host_name: for messages
    :param handles: of allocations
    :param slots: row → for each tensor: number of the allocation, offset of the first slot there and from one slot to
        the next, in bytes
    :param turns: path of the cells by which peers tell this rank that its turn has come
    """

    host: str
    host_name: str
    handles: list[str]
    slots: dict[int, list[tuple[int, int, int]]]
    turns: str

    def to_json(self) -> str:
        """Return the offer as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Offer":
        """Read what :meth:`to_json` wrote.

        :raises RuntimeError: if it is something else
        """
        try:
            fields = json.loads(text)
            slots = {
                int(row): [(int(number), int(first), int(stride)) for number, first, stride in places]
                for row, places in fields["slots"].items()
            }
            handles = [bytes.fromhex(handle).hex() for handle in fields["handles"]]
            if not {number for places in slots.values() for number, _, _ in places} <= set(range(len(handles))):
                raise ValueError("a slot is in an allocation that is not offered")  # noqa: TRY301 - one answer to all
            return cls(str(fields["host"]), str(fields["host_name"]), handles, slots, str(fields["turns"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RuntimeError(f"a rank's offer makes no sense; does it run this version? ({error!r})") from error


_HUNG: "list[_Link]" = []
"""Links that were closed while copies were under way, whose memory must stay for good."""


class _Link:
    """What this rank has mapped of the others."""

    def __init__(self, memory: PeerMemory, device: Device, workers: Workers, rank: int, num_ranks: int) -> None:
        self.workers = workers
        self._memory = memory
        self._device = device
        self.end = device.record()
        """Of all copies so far."""
        self._mappings: list[int] = []
        self._rank = rank
        self._places: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        """Peer and row → ``[2, tensors]``: where first slots are mapped, and how far it is from one to the next."""
        self.turns = Turns(rank, num_ranks)

    def offer(self, weights: ExpertWeights) -> Offer:
        """Export live weights."""
        numbers: dict[int, int] = {}
        handles: list[str] = []
        slots: dict[int, list[tuple[int, int, int]]] = {}
        for row in weights.rows:
            slots[row] = []
            for view in weights.views(row):
                base, handle = self._memory.export(view.data_ptr())
                number = numbers.setdefault(base, len(handles))
                if number == len(handles):
                    handles.append(handle.hex())
                slots[row].append((number, view.data_ptr() - base, view.stride(0)))
        return Offer(_BOOT_ID.read_text().strip(), socket.gethostname(), handles, slots, self.turns.path)

    @property
    def peers(self) -> frozenset[int]:
        """Ranks that something is mapped of."""
        return frozenset(peer for peer, _ in self._places)

    def map(self, offers: list[Offer], *, within_host: bool) -> None:
        """Map what all other ranks offer, or those of this host.

        :raises RuntimeError: if that cannot be
        """
        here = offers[self._rank]
        for peer, offer in enumerate(offers):
            if peer == self._rank or (within_host and offer.host != here.host):
                continue
            if offer.host != here.host:
                raise RuntimeError(f"rank {peer} is on another host, {offer.host_name}; this is {here.host_name}")
            bases = [self._open(peer, bytes.fromhex(handle)) for handle in offer.handles]
            for row, places in offer.slots.items():
                mapped = [(bases[number] + offset, stride) for number, offset, stride in places]
                self._places[peer, row] = np.array(mapped, dtype=np.int64).T
        self.turns.map({peer: offers[peer].turns for peer in self.peers}, self._memory.map_host)

    def warm_up(self) -> None:
        """Read a byte of everything that is mapped, and take a turn, which not every system's driver can.

        A device's first copy from another takes a tenth of a second.
        """
        with self._device.transferring():
            target = self._device.allocate(1)
            read = Copies.of([(target.data_ptr(), address, 1) for address in self._mappings])
            self._copy([Step(read, *self.turns.trial())])
        self.end.synchronize()

    def pull(self, exchange: Exchange) -> DeviceEvent:
        """Enqueue all that an exchange pulls, behind the transfer stream; return its end.

        From one peer after another, the next rank first: so ranks that begin together begin with different ones.
        """
        steps = [] if exchange.pulls is None else self._steps(exchange.row, exchange.pulls)
        with self._device.transferring():
            self._copy(steps)
        return self.end

    def hold_up(self) -> None:
        """Let the transfer stream, and so who fills staging next, wait for copies that nobody waits for any more."""
        self.turns.release()
        with self._device.transferring():
            self._device.wait(self.end)

    def close(self) -> None:
        """Unmap everything, unless copies are still under way after a while: these must not lose their source."""
        self.turns.unlink()
        self.turns.release()
        self._places.clear()
        try:
            until_passed(self.end, time.monotonic() + _CLOSE_TIMEOUT_S)
        except TimeoutError:
            _HUNG.append(self)
            return
        while self._mappings:
            self._memory.close(self._mappings.pop())
        self.turns.unmap(self._memory.unmap_host)

    def _steps(self, row: int, pulls: Pulls) -> list[Step]:
        by_peer: dict[int, list[Pull]] = defaultdict(list)
        for pull in pulls.slots:
            by_peer[pull.peer].append(pull)
        steps = []
        for peer in sources_of(self._rank, self.turns.members):
            slots = by_peer.pop(peer, [])
            first, stride = self._places[peer, row]
            sources = first + np.array([pull.src_slot for pull in slots], dtype=np.int64)[:, None] * stride
            targets = pulls.memory.addresses([pull.dst_slot for pull in slots])
            nbytes = np.broadcast_to(np.array(pulls.memory.slot_nbytes, dtype=np.int64), targets.shape)
            copies = Copies(targets.ravel(), sources.ravel(), nbytes.ravel())
            steps.append(Step(copies, *(self.turns.around(peer) if pulls.in_turn else ())))
        if by_peer:
            raise RuntimeError(f"nothing is mapped of ranks {sorted(by_peer)}")
        if pulls.in_turn:
            self.turns.advance()
        return steps

    def _copy(self, steps: Sequence[Step]) -> None:
        try:
            self._memory.copy(steps)
        finally:
            self.end = self._memory.end()

    def _open(self, peer: int, handle: bytes) -> int:
        try:
            address = self._memory.open(handle)
        except RuntimeError as error:
            raise RuntimeError(f"the weights of rank {peer} cannot be mapped: {error}") from error
        self._mappings.append(address)
        return address
