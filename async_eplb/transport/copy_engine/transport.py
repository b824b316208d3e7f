"""A transport for GPUs of one host: receivers pull peers' live weights with plain copies, without kernels.

Each rank exports the allocations that its live weights are in, once, when it opens; the others map them. A receive is
then a copy from the mapping to staging, behind the transfer stream, which goes on meanwhile. While the model serves, it
needs nothing of the peer but its earlier grant of the layer (:attr:`LaunchRule.GRANTED`). So it cannot deadlock with
anything that the model runs. While no rank serves, ranks take turns at the sources that they read (:mod:`.turns`).
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch.distributed import ProcessGroup

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device, DeviceEvent, until_passed
from async_eplb.errors import BrokenTransport, EplbError, IpcUnavailable, TransferTimeout
from async_eplb.groups import Membership, gather
from async_eplb.transport.base import OPEN_TIMEOUT_S, PendingExchange, PreparedExchange
from async_eplb.transport.control import GlooControlGroup
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc, PeerMemory
from async_eplb.transport.copy_engine.peer_weights import CLOSE_TIMEOUT_S, Offer, PeerWeights
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.joining import Member, Opening
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Interruptible, Work, Workers


class CopyEngineTransport(Member):
    """Moves weights between GPUs of one host by copies that receivers enqueue.

    Like all calls that concern a group, transports are constructed in the same order on all its ranks.
    Opening raises :class:`IpcUnavailable` on all ranks if any cannot read another's weights. Live weights may be
    freed when all ranks have closed their transports.

    :param group: the EP group, of which this process must be a member; the world without it. It is only used to find
        the other ranks
    :param within_host: leave out ranks of other hosts, instead of refusing them
    :param memory: makes the object that maps and copies memory of other processes, for the device of the weights
    :raises InvalidGroup: if there is no group, or it has no store; :class:`NotAMember` if this process is not in it
    """

    launch_rule = LaunchRule.GRANTED

    def __init__(
        self,
        group: ProcessGroup | Membership | None = None,
        *,
        within_host: bool = False,
        memory: Callable[[torch.device], PeerMemory] = CudaIpc,
    ) -> None:
        super().__init__(group)
        self._within_host = within_host
        self._make_memory = memory
        self._peers: PeerWeights | None = None
        self._num_mapped = 0
        self._open_timeout_s = OPEN_TIMEOUT_S

    def __repr__(self) -> str:
        return f"<CopyEngineTransport rank {self.rank} of {self.num_ranks}, {self._state}>"

    @property
    def one_sided_peers(self) -> frozenset[int]:
        """Ranks whose weights are mapped."""
        return frozenset() if self._peers is None else self._peers.ranks

    def _connect(self, opening: Opening) -> GlooControlGroup:
        """Map the live weights of all other ranks.

        :raises IpcUnavailable: if a rank cannot read those of another, on every rank
        """
        self._open_timeout_s = opening.open_timeout_s
        control = self._connect_control(opening)
        self._map(opening.device, opening.workers, opening.weights)
        return control

    async def rebind(self, weights: ExpertWeights) -> None:
        """Unmap the weights of all other ranks, and map their new ones.

        :raises OpenTimeout: if a rank does not call this within the time in which all had to open
        :raises IpcUnavailable: as :meth:`open`
        """
        peers = self._require_open()
        await peers.workers.run(Work.EXCHANGE, partial(self._remap, peers, weights))

    def _remap(self, peers: PeerWeights, weights: ExpertWeights) -> None:
        self._peers = None
        try:
            peers.close()
            self._gather("unmapped", "")
            self._map(peers.device, peers.workers, weights)
        except EplbError:
            self.abort()
            raise
        except RuntimeError as error:
            self.abort()
            raise BrokenTransport(f"{self!r} cannot rebind weights: {error}", rank=self.rank) from error

    def _map(self, device: Device, workers: Workers, weights: ExpertWeights) -> None:
        """Offer this rank's weights, and map what all other ranks offer.

        :raises IpcUnavailable: if a rank cannot read those of another, on every rank
        """
        self._num_mapped += 1
        offer, failure = "", ""
        try:
            memory = self._make_memory(device.torch_device)
            self._peers = PeerWeights(memory, device, workers, self.rank, self.num_ranks)
            offer = self._peers.offer(weights).to_json()
        except (RuntimeError, OSError) as error:
            failure = str(error)
        offers = self._gather("offer", offer)
        if self._peers is not None and all(offers):
            try:
                self._peers.map([Offer.from_json(each) for each in offers], within_host=self._within_host)
                self._peers.warm_up()
            except RuntimeError as error:
                failure = str(error)
        failures = self._gather("failure", failure)
        if self._peers is not None:
            self._peers.turns.unlink()
        ranks = tuple(rank for rank, each in enumerate(failures) if each)
        if ranks:
            if self._peers is not None:
                self._peers.close()
                self._peers = None
            reasons = "; ".join(f"rank {rank}: {failures[rank]}" for rank in ranks)
            raise IpcUnavailable(f"the copy engine cannot move weights between these ranks: {reasons}", ranks=ranks)

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Check an exchange. Its pulls are enqueued when the launched exchange is started.

        :raises BrokenTransport: also if it has messages, which nobody would move
        """
        peers = self._require_open()
        if exchange.has_messages:
            raise BrokenTransport(f"{self!r} pulls slots, and moves no messages", rank=self.rank)
        return _PreparedPull(self._require_open, partial(_Pull, self, peers, exchange))

    def replacement(self, number: int) -> "CopyEngineTransport":
        """Return an unused transport between the same ranks, which maps their weights anew."""
        place = self.board.part(f"replacement {number}")
        return CopyEngineTransport(place, within_host=self._within_host, memory=self._make_memory)

    def abort(self) -> None:
        """Break the transport. Copies under way end by themselves, and wait for no turn.

        Peers that wait for this rank to pass a turn on, which it had not enqueued, do so until they break theirs.
        """
        self._state = "broken"
        if self._peers is not None:
            self._peers.hold_up()

    async def aclose(self) -> None:
        """Unmap the weights of all other ranks, and wait until they have unmapped this one's."""
        peers, self._peers = self._peers, None
        self._become_closed()
        if peers is not None:
            await peers.workers.run(Work.EXCHANGE, partial(self._close, peers))

    def _close(self, peers: PeerWeights) -> None:
        peers.close()
        with suppress(EplbError):  # what dead ranks have mapped is gone with them
            gather(self.board, "closed", "", CLOSE_TIMEOUT_S)

    def _require_open(self) -> PeerWeights:
        if self._peers is None or not self.is_open:
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self.rank)
        return self._peers

    def _gather(self, what: str, text: str) -> list[str]:
        return gather(self.board, f"{what} {self._num_mapped}", text, self._open_timeout_s)


class _PreparedPull:
    def __init__(self, require_open: Callable[[], object], launch: Callable[[], PendingExchange]) -> None:
        self._require_open = require_open
        self._launch = launch

    def launch(self) -> PendingExchange:
        self._require_open()
        return self._launch()


class _Pull:
    def __init__(self, transport: CopyEngineTransport, peers: PeerWeights, exchange: Exchange) -> None:
        self._transport = transport
        self._peers = peers
        self._exchange = exchange
        self._started = False
        self._end: DeviceEvent | None = None

    async def start(self) -> None:
        self._started = True
        await self._in_thread(Work.PULL, self._enqueue)

    async def wait(self, timeout_s: float) -> None:
        if not self._started:
            await self.start()
        try:
            finish = partial(self._finish, time.monotonic() + timeout_s)
            await self._in_thread(Work.EXCHANGE, Interruptible(finish, self._transport.abort))
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
            await self._peers.workers.run(kind, function)
        except RuntimeError as error:
            self._transport.abort()
            raise BrokenTransport(f"{self._where}: {error}", rank=self._transport.rank) from error

    def _enqueue(self) -> None:
        if not self._transport.is_open:
            raise RuntimeError(f"{self._transport!r} cannot move anything")
        self._end = self._peers.pull(self._exchange)

    def _finish(self, deadline: float) -> None:
        try:
            until_passed(self._end or self._peers.end, deadline)
        except TimeoutError:
            self._peers.turns.release()  # from this thread: the event loop may be waiting for the device
            raise
        if self._end is None or not self._transport.is_open:
            raise RuntimeError(f"{self._transport!r} did not move everything")
