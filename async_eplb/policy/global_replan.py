"""The policy that places all experts anew, wherever there is room for them."""

from dataclasses import dataclass

import numpy as np

from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.check import require_room, require_same_model
from async_eplb.policy.packing import place_groups
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True)
class Global:
    """Place experts regardless of groups and nodes: replicate the hottest, then balance over all ranks.

    It is DeepSeek's published algorithm for one group on one node. It moves nearly all experts.
    """

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Place experts anew; of the current placement only its layers and experts matter.

        :raises InvalidLoad: if load and placement have different layers or experts
        :raises TooFewSlots: if there are fewer slots than experts
        """
        require_same_model(load, current)
        return self.place(load, topology)

    def place(self, load: ExpertLoad, topology: EPTopology) -> ExpertPlacement:
        """Return a first placement, where there is none to begin with.

        :raises TooFewSlots: if there are fewer slots than experts
        """
        require_room(load, topology)
        one_node = EPTopology(topology.num_ranks, 1, topology.num_local_physical_experts)
        one_group = np.zeros((load.num_layers, 1), dtype=np.int64)  # [layers, groups]
        return place_groups(load, one_group, one_node)
