"""Policies as values: what a rebalance is told to use, each printed by its options."""

from dataclasses import dataclass
from typing import Protocol

from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.check import require_same_model
from async_eplb.policy.hierarchical import global_, hierarchical
from async_eplb.policy.incremental import incremental
from async_eplb.policy.objective import Objective, tokens
from async_eplb.topology import EPTopology


class PlacementPolicy(Protocol):
    """Chooses a placement. It is pure: ranks that call it with equal arguments get equal results."""

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology, /) -> ExpertPlacement:
        """Return a placement of the same layers and experts, with a replica of each expert in each layer."""
        ...


@dataclass(frozen=True, slots=True)
class Hierarchical:
    """:func:`hierarchical` as a policy, which does not look at the current placement."""

    num_groups: int

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Place groups on nodes, then experts on ranks."""
        require_same_model(load, current)
        return hierarchical(load, topology, num_groups=self.num_groups)


@dataclass(frozen=True, slots=True)
class Global:
    """:func:`global_` as a policy, which does not look at the current placement."""

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Place experts on ranks."""
        require_same_model(load, current)
        return global_(load, topology)


@dataclass(frozen=True, slots=True)
class Incremental:
    """:func:`incremental` as a policy, with its options."""

    max_moves_per_layer: int | None = None
    target: float = 1.02
    num_groups: int | None = None
    objective: Objective = tokens
    regroup_above: float = 1.03
    replan_above: float = 1.1

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Move few experts."""
        return incremental(
            load,
            current,
            topology,
            max_moves_per_layer=self.max_moves_per_layer,
            target=self.target,
            num_groups=self.num_groups,
            objective=self.objective,
            regroup_above=self.regroup_above,
            replan_above=self.replan_above,
        )
