"""The choice of how an update is planned; equal on all ranks."""

from dataclasses import dataclass

from async_eplb.arguments import OneOf, settle
from async_eplb.errors import InvalidOptions
from async_eplb.plan.senders import SOURCES
from async_eplb.plan.transfers import Ints, Transfers, find_needs
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True)
class Planner:
    """How the sender of each transfer is chosen. The final weights are the same.

    :param sources: ``"chunked"``: as :func:`plan_layer`; ``"balanced"``: the busiest sender sends as little as it can
        across nodes, and then in all; ``"relayed"``: besides, what several ranks of a node need crosses nodes once and
        is passed on inside the node, which one-sided transports cannot do
    :raises InvalidOptions: if there is no such choice
    """

    sources: str = "chunked"

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, sources=OneOf(tuple(SOURCES)))

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
        return SOURCES[self.sources](find_needs(old, new, topology), len(old), topology)
