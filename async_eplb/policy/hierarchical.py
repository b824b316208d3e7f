"""The policy that places groups of experts on nodes, and then experts on the ranks of each node, all anew."""

from dataclasses import dataclass

import numpy as np
from einops import rearrange

from async_eplb.arguments import Whole, settle
from async_eplb.errors import InvalidOptions
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.check import groups_stay_on_nodes, require_room, require_same_model
from async_eplb.policy.global_replan import Global
from async_eplb.policy.packing import Weight, pack, place_groups
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True)
class Hierarchical:
    """Place experts group by group: each group on one node, balanced over nodes, then over the ranks of a node.

    It is DeepSeek's published algorithm. Groups are consecutive experts, equally many each. Where they do not divide
    over the nodes, the published code places experts as :class:`Global` does, whatever their groups, and so does this.
    It moves nearly all experts.

    :param num_groups: groups that the router limits tokens to, so that traffic stays within nodes
    :raises InvalidOptions: if it is no whole number of at least 1
    """

    num_groups: int

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, num_groups=Whole(1))

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Place groups and experts anew; of the current placement only its layers and experts matter.

        :raises InvalidLoad: if load and placement have different layers or experts
        :raises InvalidOptions: if the groups divide over the nodes, but not the experts over them
        :raises TooFewSlots: if there are fewer slots than experts
        """
        require_same_model(load, current)
        return self.place(load, topology)

    def place(self, load: ExpertLoad, topology: EPTopology) -> ExpertPlacement:
        """Return a first placement, where there is none to begin with.

        :raises InvalidOptions: if the groups divide over the nodes, but not the experts over them
        :raises TooFewSlots: if there are fewer slots than experts
        """
        require_room(load, topology)
        if not groups_stay_on_nodes(self.num_groups, load.num_logical_experts, topology):
            return Global().place(load, topology)
        groups = pack(_group_sums(load, self.num_groups), topology.num_nodes)  # [layers, groups]
        return place_groups(load, groups, topology)


def _group_sums(load: ExpertLoad, num_groups: int) -> Weight:
    """Return the load of each group, summed in float64 and rounded once: ``[layers, groups]``."""
    rounded = rearrange(
        load.tokens.astype(np.float32), "layers (groups experts) -> layers groups experts", groups=num_groups
    )
    return np.asarray(rounded.sum(axis=2, dtype=np.float64), dtype=np.float32)
