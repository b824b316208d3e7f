"""The interface of a policy, which chooses where experts go."""

from typing import Protocol

from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.topology import EPTopology


class PlacementPolicy(Protocol):
    """Chooses a placement. It is pure: ranks that call it with equal arguments get equal results.

    Its ``repr`` names it in logs and errors, with its options.
    """

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology, /) -> ExpertPlacement:
        """Return a placement of the same layers and experts, with a replica of each expert in each layer."""
        ...
