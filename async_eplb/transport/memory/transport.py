"""A transport inside one event loop, for tests and simulation: real bytes, scheduled delays and faults."""

from collections.abc import Collection, Sequence

from async_eplb.device import Device
from async_eplb.errors import BusyTransport
from async_eplb.transport.base import OPEN_TIMEOUT_S, ControlGroup, PreparedExchange
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.identity import Identity, require_one
from async_eplb.transport.meeting import meet
from async_eplb.transport.memory.control import MemoryControlGroup
from async_eplb.transport.memory.exchange import PreparedInMemory
from async_eplb.transport.memory.schedule import MemorySchedule
from async_eplb.transport.memory.world import MemoryWorld
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


class MemoryBoard:
    """Texts of the ranks of a world."""

    def __init__(self, world: MemoryWorld, rank: int) -> None:
        self.rank = rank
        self.num_ranks = world.num_ranks
        self._texts = world.texts

    def put(self, key: str, text: str) -> None:
        """Leave a text."""
        self._texts[key] = text

    def get(self, keys: Sequence[str]) -> list[str] | None:
        """Return the texts of all these keys, or None if one is not there yet."""
        return [self._texts[key] for key in keys] if self._texts.keys() >= set(keys) else None

    def explain(self, missing: Sequence[int]) -> str:  # noqa: ARG002 - worlds have one transport of each rank
        """Return nothing more."""
        return ""


class MemoryTransport:
    """One rank of a world inside this process; all ranks run in one event loop.

    Made by :meth:`world`. Bytes are copied when a message is delivered, so a sender that changes live weights too
    early is noticed.
    """

    def __init__(self, world: MemoryWorld, rank: int) -> None:
        self.launch_rule = world.schedule.launch_rule
        self.board = MemoryBoard(world, rank)
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
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        identity: Identity | None = None,
        relay_peers: Collection[int] = (),  # noqa: ARG002
    ) -> ControlGroup:
        """Add this rank's weights to the world and return its control group; there is nothing to connect.

        One task may open all ranks, one after another. So only what has a name waits for the others, to compare it.
        """
        if self._rank in self._world.weights:
            raise BusyTransport(f"{self!r} is in use; make one transport for each updater")
        self._world.weights[self._rank] = weights
        identity = identity or Identity()
        own = identity.to_json()
        if identity.name:
            require_one(await meet(workers, self.board, "open", own, timeout_s=open_timeout_s), self._rank)
        else:
            self.board.put(f"open/{self._rank}", own)
        return MemoryControlGroup(self._world, self._rank, control_timeout_s)

    async def rebind(self, weights: ExpertWeights) -> None:
        """Replace this rank's weights in the world."""
        self._world.require_open(self._rank)
        self._world.weights[self._rank] = weights

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange, which takes nothing."""
        self._world.require_open(self._rank)
        return PreparedInMemory(self._world, self._rank, exchange)

    def replacement(self, number: int) -> "MemoryTransport":
        """Return this rank's transport in a world that replaces this one."""
        return MemoryTransport(self._world.replacement(number), self._rank)

    def abort(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)

    def die(self) -> None:
        """Close all connections of this rank, as when its process dies."""
        self._world.die(self._rank)

    async def aclose(self) -> None:
        """Leave the world."""
        self._world.leave(self._rank)
