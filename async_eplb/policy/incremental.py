"""The incremental policy: from the current placement, few moves that reach the balance target."""

import math

import numpy as np

from async_eplb.errors import InvalidOptions
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.policy.check import require_complete
from async_eplb.policy.hierarchical import global_, hierarchical, place_groups, require_groups
from async_eplb.policy.measure import rank_costs, receives
from async_eplb.policy.objective import FloatArray, IntArray, Objective, require_objective, tokens
from async_eplb.policy.regroup import groups_by_node, relieve_nodes
from async_eplb.policy.search import ROUNDING, Search
from async_eplb.topology import EPTopology

_FINE = 1.02
"""Slots are fine enough to come close to a node's mean if a greedy replan comes this close."""
_CLOSE = 1.002
"""How close, then."""


def incremental(
    load: ExpertLoad,
    current: ExpertPlacement,
    topology: EPTopology,
    *,
    max_moves_per_layer: int | None = None,
    target: float = 1.02,
    num_groups: int | None = None,
    objective: Objective = tokens,
    regroup_above: float = 1.03,
    replan_above: float = 1.1,
) -> ExpertPlacement:
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
        over the nodes (see :func:`hierarchical`), for experts that may go anywhere
    :param objective: from a replica's tokens a step to its cost
    :param regroup_above: two groups of a layer swap nodes, which takes about ``2 / num_groups`` of its slots, if the
        most loaded node costs more than this factor of what it does then; infinite for never
    :param replan_above: a layer that would end with a peak more than this factor above a full replan's, regrouping
        included, takes the replan's row, unless that takes too many moves; infinite for never
    :raises InvalidLoad: if load and placement have different layers or experts
    :raises InvalidOptions: if an option is out of its range, or the groups do not divide the experts
    :raises InvalidPlacement: if the current placement does not fit the topology, or lacks an expert
    """
    _require_options(max_moves_per_layer, target, regroup_above, replan_above)
    require_objective(objective)
    cost = rank_costs(load, current, topology, objective)
    require_complete(current, topology)
    if num_groups is not None:
        require_groups(num_groups, current.num_logical_experts)
    slots = topology.num_physical_experts
    budget = slots if max_moves_per_layer is None else min(max_moves_per_layer, slots)
    enough = target * (1 - 2 * ROUNDING) * cost.mean(axis=1)

    if num_groups is None or num_groups % topology.num_nodes:
        blocks, start, settled = 1, current, np.ones(len(cost), dtype=bool)
        replan = bound = global_(load, topology)
    else:
        blocks = topology.num_nodes
        replan = hierarchical(load, topology, num_groups=num_groups)
        groups, settled = groups_by_node(current, topology, num_groups)
        start, groups = relieve_nodes(
            load, current, topology, groups, settled, objective, enough=enough, above=regroup_above, budget=budget
        )
        bound = place_groups(load, groups, topology)
    aim = _aim(rank_costs(load, start, topology, objective), blocks, _peaks(load, bound, topology, objective))
    limit = np.maximum(enough, np.minimum(aim, cost.max(axis=1)))
    limit[~settled] = np.inf
    found = Search(
        _blocks(current, topology, blocks),
        _blocks(start, topology, blocks),
        np.repeat(load.tokens_per_step(), blocks, axis=0),
        np.repeat(limit, blocks),
        objective,
        np.full(len(cost), budget),
    ).run()
    changed = ExpertPlacement.from_mapping(
        np.where(found == current.num_logical_experts, EMPTY_SLOT, found).reshape(len(cost), slots),
        current.num_logical_experts,
    )

    peak = _peaks(load, changed, topology, objective)
    replanned = ~settled | (peak > replan_above * _peaks(load, replan, topology, objective))
    if replanned.any():
        replanned &= receives(current, replan, topology).sum(axis=1) <= budget
        changed = changed.with_layers(replan, tuple(int(layer) for layer in np.flatnonzero(replanned)))
        peak = _peaks(load, changed, topology, objective)
    worse = np.flatnonzero(settled & (peak > cost.max(axis=1) * (1 + 2 * ROUNDING)))
    return changed.with_layers(current, tuple(int(layer) for layer in worse))


def _aim(cost: FloatArray, num_blocks: int, reachable: FloatArray) -> FloatArray:
    """Return the peak that a search can be expected to reach ``[layers]``.

    :param cost: of the ranks that it starts from ``[layers, ranks]``
    :param num_blocks: blocks of ranks that experts stay in
    :param reachable: peak of a replan that keeps experts in their blocks ``[layers]``
    """
    floor = cost.reshape(len(cost), num_blocks, -1).mean(axis=2).max(axis=1)
    return np.where(reachable <= _FINE * floor, np.minimum(reachable, _CLOSE * floor), reachable)


def _blocks(placement: ExpertPlacement, topology: EPTopology, num_blocks: int) -> IntArray:
    """Return the expert of each slot, block by block: int64 ``[layers * blocks, ranks, slots]``."""
    maps = placement.physical_to_logical_map
    experts = np.where(maps == EMPTY_SLOT, placement.num_logical_experts, maps).astype(np.int64)
    return experts.reshape(len(maps) * num_blocks, topology.num_ranks // num_blocks, -1)


def _peaks(load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology, objective: Objective) -> FloatArray:
    return np.asarray(rank_costs(load, placement, topology, objective).max(axis=1))


def _require_options(max_moves_per_layer: int | None, target: float, regroup_above: float, replan_above: float) -> None:
    rules = {
        "max_moves_per_layer": (max_moves_per_layer, max_moves_per_layer is None or max_moves_per_layer >= 0, 0),
        "target": (target, 1 <= target < math.inf, 1),
        "regroup_above": (regroup_above, regroup_above >= 1, 1),
        "replan_above": (replan_above, replan_above >= 1, 1),
    }
    for option, (value, holds, least) in rules.items():
        if not holds:
            raise InvalidOptions(f"{option} is {value!r}; it must be a number of at least {least}", option=option)
