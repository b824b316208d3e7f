"""A transport that pulls within a host and sends messages between hosts."""

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch
from torch.distributed import ProcessGroup

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.groups import Board, Membership, join
from async_eplb.transport.base import OPEN_TIMEOUT_S, ControlGroup, PendingExchange, PreparedExchange
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc, PeerMemory
from async_eplb.transport.copy_engine.transport import CopyEngineTransport
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.identity import Identity
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.transport import Backend, TorchDistTransport
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


class HybridTransport:
    """A :class:`CopyEngineTransport` between ranks of one host, and a :class:`TorchDistTransport` between hosts.

    :param group: the EP group, of which this process must be a member; the world without it
    :param backend: between hosts; without it, by the device of the weights
    :param nccl: between hosts, how much of the GPU NCCL may take
    :param memory: within a host, as for the copy engine
    :raises InvalidGroup: if there is no group, or it has no store; :class:`NotAMember` if this process is not in it
    """

    def __init__(
        self,
        group: ProcessGroup | Membership | None = None,
        *,
        backend: Backend | None = None,
        nccl: NcclOptions = NcclOptions(),  # noqa: B008 - a frozen value
        memory: Callable[[torch.device], PeerMemory] = CudaIpc,
    ) -> None:
        self._place = join(group, "transport")
        self._again = partial(HybridTransport, backend=backend, nccl=nccl, memory=memory)
        self._near = CopyEngineTransport(self._place.part("near"), within_host=True, memory=memory)
        self._far = TorchDistTransport(self._place.part("far"), backend=backend, nccl=nccl)

    def __repr__(self) -> str:
        return f"<HybridTransport of {self._near!r} and {self._far!r}>"

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._near.rank

    @property
    def num_ranks(self) -> int:
        """Processes of the group."""
        return self._near.num_ranks

    @property
    def run_id(self) -> str:
        """Name of this run in logs."""
        return self._near.run_id

    @property
    def board(self) -> Board:
        """Where ranks leave texts for each other."""
        return self._near.board

    @property
    def launch_rule(self) -> LaunchRule:
        """The rules of both parts together; known once the transport is open."""
        return LaunchRule.GRANTED_IN_ORDER if self._far.launch_rule.needs_order else LaunchRule.GRANTED

    @property
    def one_sided_peers(self) -> frozenset[int]:
        """The other ranks of this host."""
        return self._near.one_sided_peers

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        identity: Identity | None = None,
        relay_peers: Collection[int] = (),  # noqa: ARG002 - a part that pulls cannot relay
    ) -> ControlGroup:
        """Map the live weights of this host's ranks, and connect to all ranks.

        :raises IpcUnavailable: if a rank cannot read those of another of its host, on every rank
        """
        open_near, open_far = (
            partial(
                part.open, device, workers, weights, control_timeout_s=control_timeout_s, open_timeout_s=open_timeout_s
            )
            for part in (self._near, self._far)
        )
        control = await open_near(identity=identity)
        await open_far()
        return control

    async def rebind(self, weights: ExpertWeights) -> None:
        """Map the new weights of this host's ranks.

        :raises IpcUnavailable: as :meth:`open`
        """
        await self._near.rebind(weights)
        await self._far.rebind(weights)

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare messages between hosts and pulls within this one."""
        far = self._far.prepare(replace(exchange, pulls=None))
        if exchange.pulls is None:
            return far
        return _PreparedBoth(self, self._near.prepare(replace(exchange, groups=())), far)

    def replacement(self, number: int) -> "HybridTransport":
        """Return an unused transport between the same ranks."""
        return self._again(self._place.part(f"replacement {number}"))

    def abort(self) -> None:
        """Break both parts."""
        self._near.abort()
        self._far.abort()

    async def aclose(self) -> None:
        """Close both parts."""
        try:
            await self._far.aclose()
        finally:
            await self._near.aclose()


class _PreparedBoth:
    def __init__(self, transport: HybridTransport, near: PreparedExchange, far: PreparedExchange) -> None:
        self._transport = transport
        self._near = near
        self._far = far

    def launch(self) -> PendingExchange:
        far = self._far.launch()
        return _PendingBoth(self._transport, self._near.launch(), far)


class _PendingBoth:
    def __init__(self, transport: HybridTransport, near: PendingExchange, far: PendingExchange) -> None:
        self._transport = transport
        self._near = near
        self._far = far

    async def start(self) -> None:
        try:
            await self._near.start()
            await self._far.start()
        except Exception:
            self._transport.abort()
            raise

    async def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            await self._near.wait(timeout_s)
            await self._far.wait(max(deadline - time.monotonic(), 0.001))
        except Exception:
            self._transport.abort()
            raise
