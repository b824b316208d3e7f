"""A transport inside one event loop, for tests and simulation: real bytes, scheduled delays and faults."""

from collections.abc import Collection

from async_eplb.device import Device
from async_eplb.errors import BusyTransport
from async_eplb.transport.base import ControlGroup, PreparedExchange
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.memory.control import MemoryControlGroup
from async_eplb.transport.memory.exchange import PreparedInMemory
from async_eplb.transport.memory.schedule import MemorySchedule
from async_eplb.transport.memory.world import MemoryWorld
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


class MemoryTransport:
    """One rank of a world inside this process; all ranks run in one event loop.

    Made by :meth:`world`. Bytes are copied when a message is delivered, so a sender that changes live weights too
    early is noticed.
    """

    def __init__(self, world: MemoryWorld, rank: int) -> None:
        self.launch_rule = world.schedule.launch_rule
        self._world = world
        self._rank = rank

    @classmethod
    def world(cls, num_ranks: int, schedule: MemorySchedule | None = None) -> "tuple[MemoryTransport, ...]":
        """Return the connected transports of a world, by rank."""
        world = MemoryWorld(num_ranks, schedule or MemorySchedule())
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
        """Add this rank's weights to the world and return its control group; there is nothing to connect."""
        if self._rank in self._world.weights:
            raise BusyTransport(f"{self!r} is in use; make one transport for each updater")
        self._world.weights[self._rank] = weights
        return MemoryControlGroup(self._world, self._rank, control_timeout_s)

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange, which takes nothing."""
        self._world.require_open(self._rank)
        return PreparedInMemory(self._world, self._rank, exchange)

    def abort(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)

    def die(self) -> None:
        """Close all connections of this rank, as when its process dies."""
        self._world.die(self._rank)

    async def aclose(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)
