"""An update to plan: a model on a cluster, a placement, and the one that a policy chooses after loads have drifted."""

from dataclasses import dataclass

import numpy as np

from async_eplb.arguments import OneOf, OrNone, Real, Whole, settle, take
from async_eplb.errors import InvalidOptions, InvalidTopology, TooFewSlots
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy import Hierarchical, Incremental
from async_eplb.simulate.clusters import Cluster
from async_eplb.simulate.models import Model
from async_eplb.topology import EPTopology

MAX_RANKS = 1 << 20
_SPARE = 1.125
"""Slots for each expert by default: one in nine is spare, as DeepSeek-V3 is served with 288 for 256."""


@dataclass(frozen=True, slots=True)
class UpdateCase:
    """An update of a model on a cluster, after the loads of its experts have drifted.

    :param drift: sigma of the lognormal factor by which each expert's load has changed
    :param policy: ``"full"``: replan from nothing; ``"incremental"``: move few experts
    :param num_layers: to simulate; the model's without it
    :param seed: of the loads, which are gamma-distributed before the drift
    :raises InvalidOptions: if an option is out of its range
    """

    model: Model
    cluster: Cluster
    topology: EPTopology
    drift: float = 0.1
    policy: str = "full"
    num_layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        slots, experts = self.topology.num_physical_experts, self.model.num_experts
        if slots < experts:
            raise TooFewSlots(
                f"{slots} slots are too few for {experts} experts: more slots for each rank, or more ranks",
                num_physical_experts=slots,
                num_logical_experts=experts,
            )
        settle(
            self,
            InvalidOptions,
            drift=Real(),
            policy=OneOf(("full", "incremental")),
            num_layers=OrNone(Whole(1)),
            seed=Whole(0),
        )

    @staticmethod
    def topology_for(
        model: Model, cluster: Cluster, num_ranks: int, *, num_nodes: int | None = None, num_slots: int | None = None
    ) -> EPTopology:
        """Return the ranks on the fewest nodes that they divide over, with slots for the model's experts.

        :param num_nodes: instead of the cluster's
        :param num_slots: of each rank, instead of as many as give each expert an eighth more
        :raises InvalidTopology: if ranks do not divide over nodes
        """
        num_ranks = take(num_ranks, Whole(1, MAX_RANKS), "num_ranks", InvalidTopology)
        fewest = max(1, -(-num_ranks // cluster.num_ranks_per_node))
        if num_nodes is None:
            num_nodes = next((n for n in range(fewest, num_ranks) if num_ranks % n == 0), num_ranks)
        if num_slots is None:
            num_slots = -(-int(model.num_experts * _SPARE) // num_ranks)
        return EPTopology(num_ranks, num_nodes, num_slots)

    def placements(self) -> tuple[ExpertPlacement, ExpertPlacement]:
        """Return the placement before the drift and the one after it."""
        rng = np.random.default_rng(self.seed)
        # Tokens of each expert: [layers, experts].
        before = 1000 * rng.gamma(1.0, size=(self.num_layers or self.model.num_layers, self.model.num_experts))
        after = before * np.exp(self.drift * rng.standard_normal(before.shape))
        loads = [ExpertLoad.from_counts(load) for load in (before, after)]
        nodes = self.topology.num_nodes
        groups = self.model.num_groups if nodes > 1 and self.model.num_groups % nodes == 0 else 1
        replan = Hierarchical(groups)
        policy = Incremental(num_groups=groups if groups > 1 else None) if self.policy == "incremental" else replan
        old = replan.place(loads[0], self.topology)
        return old, policy(loads[1], old, self.topology)
