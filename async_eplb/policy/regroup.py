"""Find the groups of experts on each node, and swap two of them where that relieves the most loaded node."""

from itertools import product

import numpy as np
import numpy.typing as npt
from einops import reduce

from async_eplb.load.value import ExpertLoad, Tokens
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.policy.measure import receives, slot_costs
from async_eplb.policy.objective import BoolArray, FloatArray, IntArray, Objective
from async_eplb.policy.packing import replicate
from async_eplb.topology import EPTopology


def groups_by_node(placement: ExpertPlacement, topology: EPTopology, num_groups: int) -> tuple[IntArray, BoolArray]:
    """Return each layer's groups in the order of their nodes, and whether every node has as many, none shared.

    :returns: int64 ``[layers, groups]``, bool ``[layers]``
    """
    maps = placement.physical_to_logical_map  # [layers, physical]
    group = maps // (placement.num_logical_experts // num_groups)  # [layers, physical]
    node = np.arange(topology.num_physical_experts) // (
        topology.num_physical_experts // topology.num_nodes
    )  # [physical]
    rows, slots = np.nonzero(maps != EMPTY_SLOT)  # both [held]
    # First and last node of each group, [layers, groups]: equal if it is on one.
    first = np.full((len(maps), num_groups), topology.num_nodes)
    last = np.full((len(maps), num_groups), -1)
    np.minimum.at(first, (rows, group[rows, slots]), node[slots])
    np.maximum.at(last, (rows, group[rows, slots]), node[slots])
    evenly = np.arange(num_groups) // (num_groups // topology.num_nodes)  # [groups]: nodes, if each has as many
    kept = (first == last).all(axis=1) & (np.sort(first, axis=1) == evenly).all(axis=1)
    return first.argsort(axis=1, kind="stable"), kept


def relieve_nodes(
    load: ExpertLoad,
    current: ExpertPlacement,
    topology: EPTopology,
    groups: IntArray,
    settled: BoolArray,
    objective: Objective,
    *,
    enough: FloatArray,
    above: float,
    budget: int,
) -> tuple[ExpertPlacement, IntArray]:
    """Swap two groups between nodes in the layers where that pays.

    :param groups: of each layer, in the order of their nodes, int64 ``[layers, groups]``
    :param settled: layers to look at ``[layers]``
    :param enough: mean cost of a node's ranks that needs no relief ``[layers]``
    :param above: the factor by which the most loaded node, or ``enough``, has to fall
    :param budget: receives that a layer may take
    :returns: the placement with these groups swapped, and the groups in the order of their nodes
    """
    num_groups = groups.shape[1]
    size = current.num_logical_experts // num_groups
    maps = current.physical_to_logical_map  # [layers, physical]
    group_cost = np.zeros(groups.shape)  # [layers, groups]
    rows, slots = np.nonzero(maps != EMPTY_SLOT)  # both [held]
    cost = slot_costs(load, current, objective) / topology.num_ranks_per_node  # [layers, physical]
    np.add.at(group_cost, (rows, maps[rows, slots] // size), cost[rows, slots])
    ordered = np.take_along_axis(group_cost, groups, axis=1)  # [layers, groups], in the order of their nodes
    before = _node_costs(ordered, topology.num_nodes).max(axis=1)  # [layers]
    places, after = _best_swaps(ordered, topology.num_nodes)  # [layers, 2], [layers]
    pays = settled & (np.maximum(before, enough) > above * np.maximum(after, enough))

    if not pays.any():
        return current, groups
    new_maps, new_groups = maps.copy(), groups.copy()
    for layer in np.flatnonzero(pays):
        one, other = groups[layer, places[layer]]
        members = [np.arange(group * size, (group + 1) * size) for group in (one, other)]
        new_maps[layer] = _swap(maps[layer], load.tokens[layer], *members)
        new_groups[layer, places[layer]] = other, one
    placement = ExpertPlacement.from_mapping(new_maps, current.num_logical_experts)
    dear = receives(current, placement, topology).sum(axis=1) > budget  # [layers]: too many receives, not swapped
    new_groups[dear] = groups[dear]
    return placement.with_layers(current, tuple(int(layer) for layer in np.flatnonzero(dear))), new_groups


def _node_costs(cost: FloatArray, num_nodes: int) -> FloatArray:
    """Sum the costs of each node's groups: ``[layers, nodes]``."""
    return reduce(cost, "layers (nodes groups) -> layers nodes", "sum", nodes=num_nodes)


def _best_swaps(cost: FloatArray, num_nodes: int) -> tuple[IntArray, FloatArray]:
    """Find the two groups whose swap between nodes leaves the most loaded node with least.

    :param cost: of groups in the order of their nodes ``[layers, groups]``
    :returns: places of the two groups in that order, int64 ``[layers, 2]``, and the cost of the most loaded node then
        ``[layers]``, infinite on one node
    """
    layers, num_groups = cost.shape
    nodes = _node_costs(cost, num_nodes)  # [layers, nodes]
    node = np.arange(num_groups) // (num_groups // num_nodes)  # [groups]
    # Of all pairs of groups, [layers, groups, groups]: what moves, and the more costly of both nodes afterwards.
    shift = cost[:, :, None] - cost[:, None, :]
    changed = np.maximum(nodes[:, node][:, :, None] - shift, nodes[:, node][:, None, :] + shift)
    others = np.zeros((layers, num_nodes, num_nodes))  # the most costly node besides each pair of nodes
    for a, b in product(range(num_nodes), repeat=2):
        others[:, a, b] = np.delete(nodes, [a, b], axis=1).max(axis=1, initial=0.0)
    peak = np.maximum(changed, others[:, node[:, None], node])  # [layers, groups, groups]
    peak = np.where(node[:, None] == node, np.inf, peak).reshape(layers, -1)  # [layers, pairs]
    best = peak.argmin(axis=1)  # [layers]
    return np.stack(np.divmod(best, num_groups), axis=1), peak[np.arange(layers), best]


def _swap(row: npt.NDArray[np.int32], load: Tokens, one: IntArray, other: IntArray) -> npt.NDArray[np.int32]:
    """Exchange the experts of two groups in a layer: the most loaded replicas into the slots that held such.

    :param row: the expert of each slot ``[physical]``
    :param load: of each expert ``[experts]``
    :param one: experts of the one group
    :param other: experts of the other group
    :returns: the new row
    """
    swapped = row.copy()
    share = load / np.maximum(np.bincount(row[row != EMPTY_SLOT], minlength=len(load)), 1)  # [experts]
    for leaving, coming in ((one, other), (other, one)):
        slots = np.flatnonzero(np.isin(row, leaving))
        slots = slots[np.argsort(-share[row[slots]], kind="stable")]  # most loaded first
        replicas, new_share = replicate(load[None, coming].astype(np.float32), len(slots))  # [1, slots], [1, coming]
        order = np.argsort(-new_share[0, replicas[0]], kind="stable")
        swapped[slots] = coming[replicas[0, order]]
    return swapped
