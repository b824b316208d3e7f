"""Transport over torch.distributed: gloo between CPUs, NCCL between GPUs, on communicators of its own."""

from collections.abc import Collection
from datetime import timedelta
from functools import partial
from typing import Literal

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenTransport
from async_eplb.transport.base import ControlGroup, PreparedExchange
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.joining import Member
from async_eplb.transport.torch_dist.exchange import OpenLink
from async_eplb.transport.torch_dist.gloo import GlooLink
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.nccl_lanes import NcclLanes
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Work, Workers

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
    """None: both sides post each message."""

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
        self._link: OpenLink | None = None

    def __repr__(self) -> str:
        state = "broken" if self._state == "open" and self._link is not None and not self._link.is_open else self._state
        return f"<TorchDistTransport rank {self._rank} of {self._num_ranks}, {self._backend}, {state}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """Ordered with NCCL, at once with gloo; known once the transport is open."""
        return LaunchRule.ORDERED if self._backend == "nccl" else LaunchRule.AT_ONCE

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
        return await workers.run(Work.CONTROL, connect)

    def _connect(
        self, device: Device, workers: Workers, control_timeout_s: float, relay_peers: Collection[int]
    ) -> ControlGroup:
        store = PrefixStore("data", self._store)
        timeout = timedelta(seconds=max(_CONNECT_TIMEOUT_S, 2 * control_timeout_s))
        arguments = (store, self._rank, self._num_ranks, device)
        self._link = OpenLink(
            NcclLanes(*arguments, relay_peers=relay_peers, timeout=timeout, options=self._nccl)
            if self._backend == "nccl"
            else GlooLink(*arguments, timeout=timeout),
            self._rank,
            workers,
        )
        return self._connect_control(workers, control_timeout_s)

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange; with NCCL, work out how small messages are packed and allocate memory for that."""
        if self._link is None:
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self._rank)
        return self._link.prepare(exchange)

    def abort(self) -> None:
        """Break the transport and close its data connections."""
        self._state = "broken"
        if self._link is not None:
            self._link.abort()

    async def aclose(self) -> None:
        """Close the data connections."""
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._become_closed()
