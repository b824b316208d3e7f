"""Transport over torch.distributed: gloo between CPUs, NCCL between GPUs, on communicators of its own."""

import time
from collections.abc import Collection
from datetime import timedelta
from functools import partial
from typing import Literal

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenTransport, TransferTimeout
from async_eplb.transport.base import ControlGroup, Exchange, PendingExchange
from async_eplb.transport.joining import Member
from async_eplb.transport.torch_dist.gloo import GlooLink
from async_eplb.transport.torch_dist.link import Finish, Link
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.nccl_lanes import NcclLanes
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

Backend = Literal["gloo", "nccl"]

_CONNECT_TIMEOUT_S = 300.0


class TorchDistTransport(Member):
    """Moves weights between the processes of a torch.distributed group.

    The group given is only used to find the other ranks: the transport opens communicators of its own, so that it
    never disturbs the group's operations. Like all calls that concern a group, transports are constructed in the
    same order on all its ranks.

    :param group: the EP group, of which this process must be a member; the world without it
    :param backend: ``"gloo"`` or ``"nccl"``; without it, by the device of the weights
    :param nccl: how much of the GPU NCCL may take
    :raises BrokenTransport: if this process is not in the group
    """

    one_sided_peers: frozenset[int] = frozenset()
    """There are none: both sides post each message."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        backend: Backend | None = None,
        nccl: NcclOptions = NcclOptions(),  # noqa: B008 - a frozen value
    ) -> None:
        super().__init__(group)
        self._backend = backend
        self._nccl = nccl
        self._link: Link | None = None

    def __repr__(self) -> str:
        return f"<TorchDistTransport rank {self._rank} of {self._num_ranks}, {self._backend}, {self._state}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """Ordered with NCCL; it is known which backend it is once the transport is open."""
        return LaunchRule.ORDERED if self.needs_ordered_launch else LaunchRule.AT_ONCE

    @property
    def needs_ordered_launch(self) -> bool:
        """Whether the backend is NCCL."""
        return self._backend == "nccl"

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,  # noqa: ARG002 - messages bring their bytes
        *,
        control_timeout_s: float,
        relay_peers: Collection[int] = (),
    ) -> ControlGroup:
        """Connect the data and the control group, pair by pair, before the first byte is moved."""
        self._become_open()
        if self._backend is None:
            self._backend = "nccl" if device.torch_device.type == "cuda" else "gloo"
        connect = partial(self._connect, device, workers, control_timeout_s, relay_peers)
        return await workers.run("control", connect)

    def _connect(
        self, device: Device, workers: Workers, control_timeout_s: float, relay_peers: Collection[int]
    ) -> ControlGroup:
        store = PrefixStore("data", self._store)
        timeout = timedelta(seconds=max(_CONNECT_TIMEOUT_S, 2 * control_timeout_s))
        self._link = (
            NcclLanes(
                store,
                self._rank,
                self._num_ranks,
                device,
                workers,
                relay_peers=relay_peers,
                timeout=timeout,
                options=self._nccl,
            )
            if self._backend == "nccl"
            else GlooLink(store, self._rank, self._num_ranks, device, workers, timeout=timeout)
        )
        return self._connect_control(workers, control_timeout_s)

    def prepare(self, exchange: Exchange) -> None:
        """Work out how small messages are packed, and allocate what they are packed into, with NCCL."""
        if isinstance(self._link, NcclLanes):
            self._link.prepare(exchange)

    def launch(self, exchange: Exchange) -> PendingExchange:
        """Post an exchange; with NCCL, behind the current stream of the calling thread."""
        if self._link is None:
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self._rank)
        try:
            finish = self._link.launch(exchange)
        except RuntimeError as error:  # NCCL has noticed that a peer is gone
            raise BrokenTransport(f"rank {self._rank}, row {exchange.row}: {error}", rank=self._rank) from error
        return _Pending(self, exchange, finish)

    def abort(self) -> None:
        """Break the transport and close its data connections."""
        link, self._link = self._link, None
        self._state = "broken"
        if link is not None:  # from here on nobody takes for an arrival what the abort ends
            link.abort()

    async def aclose(self) -> None:
        """Close the data connections."""
        self._link = None
        self._become_closed()


class _Pending:
    def __init__(self, transport: TorchDistTransport, exchange: Exchange, finish: Finish) -> None:
        self._transport = transport
        self._row = exchange.row
        self._kind = "relay" if exchange.hop else "exchange"
        self._finish = finish

    async def start(self) -> None:
        pass

    async def wait(self, timeout_s: float) -> None:
        link = self._transport._link
        if link is None:
            raise BrokenTransport(f"{self._transport!r} was aborted", rank=self._transport.rank)
        deadline = time.monotonic() + timeout_s
        where = f"rank {self._transport.rank}, row {self._row}"
        try:
            await link.workers.run(self._kind, partial(self._finish, deadline))
        except (RuntimeError, TimeoutError) as error:
            self._transport.abort()
            if time.monotonic() >= deadline:
                raise TransferTimeout(
                    f"{where}: the exchange did not finish within {timeout_s} s ({error})",
                    rank=self._transport.rank,
                    layer=self._row,
                    timeout_s=timeout_s,
                ) from error
            raise BrokenTransport(f"{where}: {error}", rank=self._transport.rank) from error
        if self._transport._link is not link:
            raise BrokenTransport(f"{where}: {self._transport!r} was aborted meanwhile", rank=self._transport.rank)
