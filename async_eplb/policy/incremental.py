"""The policy that keeps the current placement, and makes few moves that reach the balance target."""

import math
from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce, repeat

from async_eplb.arguments import OrNone, Real, Whole, settle
from async_eplb.errors import InvalidOptions
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.policy.check import groups_stay_on_nodes, require_complete
from async_eplb.policy.global_replan import Global
from async_eplb.policy.hierarchical import Hierarchical
from async_eplb.policy.measure import rank_costs, receives
from async_eplb.policy.objective import FloatArray, IntArray, Objective, require_objective, tokens
from async_eplb.policy.packing import place_groups
from async_eplb.policy.regroup import groups_by_node, relieve_nodes
from async_eplb.policy.search import ROUNDING, Search
from async_eplb.topology import EPTopology

_FINE = 1.02
"""Slots are fine enough to come close to a node's mean if a greedy replan comes this close."""
_CLOSE = 1.002
"""How close, then."""


@dataclass(frozen=True, slots=True)
class Incremental:
    """Change the current placement by few moves, so that the peak over the mean of rank costs reaches the target.

    A move is a slot whose expert its rank has to receive. Where a full replan does not reach the target, because an
    expert is too hot, or a node too loaded for the groups that stay on it, the aim is what such a replan reaches, or
    close to the mean of the most loaded node. No layer's peak gets higher, and layers that need nothing stay as they
    are. The search is our own and described in :mod:`async_eplb.policy.search`; it finds few moves, not the fewest.

    With groups, each is on one node, and stays there with three exceptions: two groups swap nodes where that relieves
    the most loaded node enough; a layer is replanned where the search ends far above what that reaches; and so is a
    layer whose current placement has a group on several nodes.

    :param max_moves_per_layer: experts that the ranks of a layer may receive together; None for no limit
    :param target: peak over mean of the ranks' costs that is good enough
    :param num_groups: groups of consecutive experts that stay on one node each; None, or a number that does not divide
        over the nodes (see :class:`Hierarchical`), for experts that may go anywhere
    :param objective: from a replica's tokens a step to its cost
    :param regroup_above: two groups of a layer swap nodes, which takes about ``2 / num_groups`` of its slots, if the
        most loaded node costs more than this factor of what it does then; infinite for never
    :param replan_above: a layer that would end with a peak more than this factor above a full replan's, regrouping
        included, takes the replan's row, unless that takes too many moves; infinite for never
    :raises InvalidOptions: if an option is out of its range
    """

    max_moves_per_layer: int | None = None
    target: float = 1.02
    num_groups: int | None = None
    objective: Objective = tokens
    regroup_above: float = 1.03
    replan_above: float = 1.1

    def __post_init__(self) -> None:
        settle(
            self,
            InvalidOptions,
            max_moves_per_layer=OrNone(Whole(0)),
            target=Real(1),
            num_groups=OrNone(Whole(1)),
            regroup_above=Real(1, math.inf),
            replan_above=Real(1, math.inf),
        )
        require_objective(self.objective)

    def __call__(self, load: ExpertLoad, current: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
        """Move few experts.

        :raises InvalidLoad: if load and placement have different layers or experts
        :raises InvalidOptions: if the groups divide over the nodes, but not the experts over them
        :raises InvalidPlacement: if the current placement does not fit the topology, or lacks an expert
        """
        cost = rank_costs(load, current, topology, self.objective)  # [layers, ranks]
        require_complete(current, topology)
        slots = topology.num_physical_experts
        budget = slots if self.max_moves_per_layer is None else min(self.max_moves_per_layer, slots)
        enough = self.target * (1 - 2 * ROUNDING) * cost.mean(axis=1)  # [layers]

        # Blocks are the ranks that an expert stays within: the nodes with groups, all ranks without.
        experts = current.num_logical_experts
        if self.num_groups is None or not groups_stay_on_nodes(self.num_groups, experts, topology):
            blocks, start, settled = 1, current, np.ones(len(cost), dtype=bool)  # settled: [layers]
            replan = bound = Global().place(load, topology)
        else:
            blocks = topology.num_nodes
            replan = Hierarchical(self.num_groups).place(load, topology)
            groups, settled = groups_by_node(current, topology, self.num_groups)  # [layers, groups], [layers]
            start, groups = relieve_nodes(
                load,
                current,
                topology,
                groups,
                settled,
                self.objective,
                enough=enough,
                above=self.regroup_above,
                budget=budget,
            )
            bound = place_groups(load, groups, topology)
        aim = _aim(rank_costs(load, start, topology, self.objective), blocks, self._peaks(load, bound, topology))
        limit = np.maximum(enough, np.minimum(aim, cost.max(axis=1)))  # [layers]
        limit[~settled] = np.inf  # no search there: these are replanned
        found = Search(
            _blocks(current, topology, blocks),
            _blocks(start, topology, blocks),
            repeat(load.tokens_per_step(), "layers experts -> (layers blocks) experts", blocks=blocks),
            repeat(limit, "layers -> (layers blocks)", blocks=blocks),
            self.objective,
            np.full(len(cost), budget),
        ).run()  # [layers * blocks, slots of a block]
        maps = rearrange(found, "(layers blocks) slots -> layers (blocks slots)", blocks=blocks)
        maps = np.where(maps == current.num_logical_experts, EMPTY_SLOT, maps)  # [layers, physical]
        changed = ExpertPlacement.from_mapping(maps, current.num_logical_experts)

        # Layers where the search ends far above a replan take the replan's row, if it is within the budget.
        peak = self._peaks(load, changed, topology)  # [layers]
        replanned = ~settled | (peak > self.replan_above * self._peaks(load, replan, topology))
        if replanned.any():
            replanned &= receives(current, replan, topology).sum(axis=1) <= budget
            changed = changed.with_layers(replan, tuple(int(layer) for layer in np.flatnonzero(replanned)))
            peak = self._peaks(load, changed, topology)
        worse = np.flatnonzero(settled & (peak > cost.max(axis=1) * (1 + 2 * ROUNDING)))
        return changed.with_layers(current, tuple(int(layer) for layer in worse))

    def _peaks(self, load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology) -> FloatArray:
        """Return the cost of the most costly rank: ``[layers]``."""
        return np.asarray(rank_costs(load, placement, topology, self.objective).max(axis=1))


def _aim(cost: FloatArray, num_blocks: int, reachable: FloatArray) -> FloatArray:
    """Return the peak that a search can be expected to reach ``[layers]``.

    :param cost: of the ranks that it starts from ``[layers, ranks]``
    :param num_blocks: blocks of ranks that experts stay in
    :param reachable: peak of a replan that keeps experts in their blocks ``[layers]``
    """
    of_blocks = reduce(cost, "layers (blocks ranks) -> layers blocks", "mean", blocks=num_blocks)
    floor = of_blocks.max(axis=1)  # [layers]: the most loaded block, evened out
    return np.where(reachable <= _FINE * floor, np.minimum(reachable, _CLOSE * floor), reachable)


def _blocks(placement: ExpertPlacement, topology: EPTopology, num_blocks: int) -> IntArray:
    """Return the expert of each slot, block by block: int64 ``[layers * blocks, ranks, slots]``."""
    maps = placement.physical_to_logical_map  # [layers, physical]
    experts = np.where(maps == EMPTY_SLOT, placement.num_logical_experts, maps).astype(np.int64)
    return rearrange(
        experts,
        "layers (blocks ranks slots) -> (layers blocks) ranks slots",
        blocks=num_blocks,
        slots=topology.num_local_physical_experts,
    )
