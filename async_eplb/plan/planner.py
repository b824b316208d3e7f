"""Which of the ways to plan an update is taken; equal on all ranks."""

from dataclasses import dataclass

from async_eplb.errors import InvalidOptions
from async_eplb.plan.rounds import in_rounds
from async_eplb.plan.sources import SOURCES
from async_eplb.plan.transfers import Ints, Transfers, find_needs
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True)
class Planner:
    """How transfers are chosen and posted. The final weights are the same.

    :param sources: ``"chunked"``: as :func:`plan_layer`; ``"balanced"``: the busiest sender sends as little as it can
        across nodes, and then in all; ``"relayed"``: besides, what several ranks of a node need crosses nodes once and
        is passed on inside the node, which one-sided transports cannot do
    :param max_peers: ranks that a rank sends to, and that it receives from, at a time at most; any number without it
    :raises InvalidOptions: if one is out of its range
    """

    sources: str = "chunked"
    max_peers: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "sources": (self.sources in SOURCES, f"one of {', '.join(SOURCES)}"),
            "max_peers": (self.max_peers is None or self.max_peers >= 1, "at least 1"),
        }
        for option, (holds, limit) in rules.items():
            if not holds:
                raise InvalidOptions(f"{option} is {getattr(self, option)!r}; it must be {limit}", option=option)

    @property
    def relays(self) -> bool:
        """Whether ranks pass on what they have just received."""
        return self.sources == "relayed"

    def transfers(self, old: Ints, new: Ints, topology: EPTopology) -> Transfers:
        """List the transfers of all ranks in all layers.

        :param old: ``[layers, physical]``, -1 where empty
        :param new: ``[layers, physical]``
        :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
        """
        transfers = SOURCES[self.sources](find_needs(old, new, topology), len(old), topology)
        return transfers if self.max_peers is None else in_rounds(transfers, self.max_peers, topology.num_ranks)
