"""The incremental policy: from the current placement, few moves that reach the balance target."""

import math

import numpy as np

from async_eplb.errors import InvalidOptions
from async_eplb.load import ExpertLoad
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.policy.check import require_complete
from async_eplb.policy.hierarchical import global_, hierarchical, place_groups, require_groups
from async_eplb.policy.measure import rank_costs, receives
from async_eplb.policy.objective import BoolArray, IntArray, Objective, require_objective, tokens
from async_eplb.policy.search import ROUNDING, Search
from async_eplb.topology import EPTopology


def incremental(
    load: ExpertLoad,
    current: ExpertPlacement,
    topology: EPTopology,
    *,
    max_moves_per_layer: int | None = None,
    target: float = 1.02,
    num_groups: int | None = None,
    objective: Objective = tokens,
    replan_above: float = 1.1,
) -> ExpertPlacement:
    """Change the current placement by few moves, so that the peak over the mean of rank costs reaches the target.

    A move is a slot whose expert its rank has to receive. Where a full replan does not reach the target, what it
    reaches is the target. No layer's peak gets higher, and layers that need nothing are left as they are. The search is
    described in :mod:`async_eplb.policy.search`.

    With groups, each stays on its node, and the replan that sets the target keeps them there too. Only layers whose
    current placement has a group on several nodes are replanned at once.

    :param max_moves_per_layer: experts that the ranks of a layer may receive together; None for no limit
    :param target: peak over mean of the ranks' costs that is good enough
    :param num_groups: groups of consecutive experts that stay on one node each; None, or a number that does not divide
        over the nodes (see :func:`hierarchical`), for experts that may go anywhere
    :param objective: from a replica's tokens a step to its cost
    :param replan_above: a layer whose peak would end more than this factor above what a full replan reaches, regrouping
        included, takes the replan's row, unless that takes too many moves
    :raises InvalidGroups: if the groups do not divide the experts
    :raises LoadMismatch: if load and placement have different layers or experts
    :raises InvalidOptions: if an option is out of its range
    :raises InvalidPlacement: if the current placement does not fit the topology, or lacks an expert
    """
    _require_options(max_moves_per_layer, target, replan_above)
    require_objective(objective)
    costs = rank_costs(load, current, topology, objective)
    require_complete(current, topology)
    layers, slots = current.physical_to_logical_map.shape
    budget = slots if max_moves_per_layer is None else min(max_moves_per_layer, slots)

    if num_groups is None:
        grouped = False
    else:
        require_groups(num_groups, current.num_logical_experts)
        grouped = num_groups % topology.num_nodes == 0
    if grouped and num_groups is not None:
        replan = hierarchical(load, topology, num_groups=num_groups)
        groups, settled = _groups_of_nodes(current, topology, num_groups)
        bound = place_groups(load, groups, topology)
    else:
        replan = bound = global_(load, topology)
        settled = np.ones(layers, dtype=bool)
    reachable = rank_costs(load, bound, topology, objective).max(axis=1)
    replan_peak = rank_costs(load, replan, topology, objective).max(axis=1) if grouped else reachable
    limit = np.maximum(target * (1 - 2 * ROUNDING) * costs.mean(axis=1), np.minimum(reachable, costs.max(axis=1)))
    limit[~settled] = np.inf

    nodes = topology.num_nodes if grouped else 1
    experts = current.physical_to_logical_map.reshape(layers * nodes, topology.num_ranks // nodes, -1)
    search = Search(
        np.where(experts == EMPTY_SLOT, current.num_logical_experts, experts).astype(np.int64),
        np.repeat(load.tokens_per_step(), nodes, axis=0),
        np.repeat(limit, nodes),
        objective,
        np.full(layers, budget),
    )
    found = search.run().reshape(layers, slots)
    found = np.where(found == current.num_logical_experts, EMPTY_SLOT, found)
    changed = ExpertPlacement.from_mapping(found, current.num_logical_experts)

    peak = rank_costs(load, changed, topology, objective).max(axis=1)
    replanned = ~settled | (peak > replan_above * replan_peak)
    if replanned.any():
        replanned &= receives(current, replan, topology).sum(axis=1) <= budget
    return changed.with_layers(replan, tuple(int(layer) for layer in np.flatnonzero(replanned)))


def _groups_of_nodes(current: ExpertPlacement, topology: EPTopology, num_groups: int) -> tuple[IntArray, BoolArray]:
    """Return each layer's groups in the order of their nodes, and whether each node has as many, none shared.

    :returns: int64 ``[layers, groups]``, bool ``[layers]``
    """
    maps = current.physical_to_logical_map
    group = maps // (current.num_logical_experts // num_groups)
    node = np.arange(topology.num_physical_experts) // (topology.num_physical_experts // topology.num_nodes)
    rows, slots = np.nonzero(maps != EMPTY_SLOT)
    first, last = np.full((2, len(maps), num_groups), topology.num_nodes)
    last[...] = EMPTY_SLOT
    np.minimum.at(first, (rows, group[rows, slots]), node[slots])
    np.maximum.at(last, (rows, group[rows, slots]), node[slots])
    evenly = np.arange(num_groups) // (num_groups // topology.num_nodes)
    settled = (first == last).all(axis=1) & (np.sort(first, axis=1) == evenly).all(axis=1)
    return first.argsort(axis=1, kind="stable"), settled


def _require_options(max_moves_per_layer: int | None, target: float, replan_above: float) -> None:
    rules = {
        "max_moves_per_layer": (max_moves_per_layer, max_moves_per_layer is None or max_moves_per_layer >= 0, 0),
        "target": (target, 1 <= target < math.inf, 1),
        "replan_above": (replan_above, replan_above >= 1, 1),
    }
    for option, (value, holds, least) in rules.items():
        if not holds:
            raise InvalidOptions(f"{option} is {value!r}; it must be a number of at least {least}", option=option)
