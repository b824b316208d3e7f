"""Transport over torch.distributed: gloo between CPUs, NCCL between GPUs, on communicators of its own."""

from datetime import timedelta
from typing import Literal

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from async_eplb.agreement.rules import LaunchRule
from async_eplb.errors import BrokenTransport
from async_eplb.groups import Membership
from async_eplb.transport.base import PreparedExchange
from async_eplb.transport.control import GlooControlGroup
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.joining import Member, Opening
from async_eplb.transport.torch_dist.exchange import OpenLink
from async_eplb.transport.torch_dist.gloo import GlooLink
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.nccl_lanes import NcclLanes
from async_eplb.weights import ExpertWeights

Backend = Literal["gloo", "nccl"]


class TorchDistTransport(Member):
    """Moves weights between the processes of a torch.distributed group.

    The group given is only used to find the other ranks: the transport opens communicators of its own, so that it
    never disturbs the group's operations. Like all calls that concern a group, transports are constructed in the
    same order on all its ranks.

    :param group: the EP group, of which this process must be a member; the world without it
    :param backend: ``"gloo"`` or ``"nccl"``; without it, by the device of the weights
    :param nccl: how much of the GPU NCCL may take
    :raises InvalidGroup: if there is no group, or it has no store; :class:`NotAMember` if this process is not in it
    """

    one_sided_peers: frozenset[int] = frozenset()
    """None: both sides post each message."""

    def __init__(
        self,
        group: ProcessGroup | Membership | None = None,
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
        return f"<TorchDistTransport rank {self.rank} of {self.num_ranks}, {self._backend}, {state}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """Ordered with NCCL, at once with gloo; known once the transport is open."""
        return LaunchRule.ORDERED if self._backend == "nccl" else LaunchRule.AT_ONCE

    def _connect(self, opening: Opening) -> GlooControlGroup:
        """Connect the data and the control group, pair by pair, before the first byte is moved."""
        device = opening.device
        if self._backend is None:
            self._backend = "nccl" if device.torch_device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=max(opening.open_timeout_s, 2 * opening.control_timeout_s))
        store = PrefixStore("data", self.board.own)
        arguments = (store, self.rank, self.num_ranks, device, opening.weights)
        self._link = OpenLink(
            NcclLanes(*arguments, relay_peers=opening.relay_peers, timeout=timeout, options=self._nccl)
            if self._backend == "nccl"
            else GlooLink(*arguments, relays=bool(opening.relay_peers), timeout=timeout),
            self.rank,
            opening.workers,
        )
        return self._connect_control(opening)

    async def rebind(self, weights: ExpertWeights) -> None:
        """Do nothing: messages bring their bytes."""

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange; with NCCL, work out how small messages are packed."""
        if self._link is None:
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self.rank)
        return self._link.prepare(exchange)

    def replacement(self, number: int) -> "TorchDistTransport":
        """Return an unused transport between the same ranks, with the same backend."""
        return TorchDistTransport(self.board.part(f"replacement {number}"), backend=self._backend, nccl=self._nccl)

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
