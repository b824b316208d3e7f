"""Move fewer bytes to a placement that is as balanced: let ranks of a node, and whole nodes, trade places.

What each rank does for the model depends on which experts it holds together with which others, not on its number. So
a layer's new placement stays as balanced when whole ranks of a node trade places, when whole nodes do, and when
slots of a rank do. Among these, choose what receives fewest experts across nodes, and then fewest in all:

1. What node ``n`` receives across nodes when it gets the new content of node ``m`` depends on neither other nodes nor
   on which of its ranks gets what: it is each rank's distinct experts that no rank of ``n`` holds. So its ranks'
   places can be chosen for fewest receives in all, a linear assignment of ranks for each pair of nodes.
2. The pair's cost is (receives across nodes, receives in all), as one number that orders like the pair; nodes are
   assigned by a second linear assignment. So the result is optimal among all these trades, with receives counted as
   :func:`plan_layer` plans them: once for each rank and expert. To solve few pairs of many, each first counts as if
   every rank could keep what it shares most; those that the assignment then chooses are solved, until all chosen are.
3. Slots of a rank that keep their expert keep their place, and the others follow in ascending order.

Linear assignments are scipy's, a shortest augmenting path method (Crouse, 2016).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from einops import rearrange

from async_eplb.errors import MissingExtra
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.plan.transfers import Ints
from async_eplb.plan.update import require_update
from async_eplb.topology import EPTopology

Assign = Callable[[npt.NDArray[Any]], tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]
"""Costs → rows and columns of the cheapest assignment."""


def relabel(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology) -> ExpertPlacement:
    """Return the placement to update to instead of ``new``: as balanced, with fewest receives.

    In each layer, every rank's experts are those of a rank of ``new``, and every node's ranks are those of a node of
    ``new``. Another version of scipy may break ties otherwise; an update compares the ranks' placements.

    :raises MissingExtra: without scipy, which ``async-eplb[planning]`` brings
    :raises LayerCountMismatch: if the placements have different numbers of layers
    :raises InvalidPlacement: if one does not fit the topology
    :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
    """
    assign = linear_assignment()
    require_update(old, new, topology)
    before, after = (
        rearrange(
            placement.physical_to_logical_map, "layers (ranks slots) -> layers ranks slots", ranks=topology.num_ranks
        )
        for placement in (old, new)
    )
    result = np.empty_like(after)  # [layers, ranks, slots]
    for layer, (held, wanted) in enumerate(zip(before, after, strict=True)):
        places = _rank_places(held, wanted, topology, assign)
        result[layer] = keep_slots(held, wanted[places])
    return ExpertPlacement.from_mapping(
        rearrange(result, "layers ranks slots -> layers (ranks slots)"), new.num_logical_experts
    )


def _rank_places(held: Ints, wanted: Ints, topology: EPTopology, assign: Assign) -> npt.NDArray[np.intp]:
    """Return which rank of the new placement each rank shall be: ``[ranks]``.

    :param held: ``[ranks, slots]``
    :param wanted: ``[ranks, slots]``
    """
    num_nodes, per_node = topology.num_nodes, topology.num_ranks_per_node
    num_experts = max(int(held.max()), int(wanted.max())) + 1
    holds, wants = _membership(held, num_experts), _membership(wanted, num_experts)  # [ranks, experts]
    node_holds = holds.reshape(num_nodes, per_node, num_experts).any(axis=1)  # [nodes, experts]
    of_new = wants.T.astype(np.float32)  # [experts, new ranks]; products of integers would take much longer
    kept = holds.astype(np.float32) @ of_new  # [ranks, new ranks]: experts that a rank keeps as a new rank
    near = node_holds.astype(np.float32) @ of_new  # [nodes, new ranks]: experts of a new rank that the node holds
    near_of_nodes = near.reshape(num_nodes, num_nodes, per_node).sum(axis=2, dtype=np.float64)  # [nodes, new nodes]
    blocks = kept.reshape(num_nodes, per_node, num_nodes, per_node).swapaxes(1, 2)  # [nodes, nodes, ranks, ranks]
    weight = held.size + 1  # more than all receives: experts that stay on their node count first
    of_node = np.arange(num_nodes)
    # [nodes, new nodes]: at most what is kept by the best places of a node's ranks; exact where ``known``
    most_kept = np.minimum(blocks.max(axis=3).sum(axis=2), blocks.max(axis=2).sum(axis=2)).astype(np.float64)
    known = most_kept == 0
    inner = np.tile(np.arange(per_node), (num_nodes, num_nodes, 1))  # [nodes, new nodes, ranks]: new rank of each rank
    while True:
        _, node = assign(-(near_of_nodes * weight + most_kept))  # [nodes]: new node of each node
        unknown = np.flatnonzero(~known[of_node, node])
        if not len(unknown):
            return np.asarray((node[:, None] * per_node + inner[of_node, node]).reshape(-1))
        for here, there in zip(unknown, node[unknown], strict=True):
            ranks, inner[here, there] = assign(-blocks[here, there])
            most_kept[here, there] = blocks[here, there][ranks, inner[here, there]].sum()
            known[here, there] = True


def _membership(maps: Ints, num_experts: int) -> npt.NDArray[np.bool_]:
    """Return which experts each rank has: ``[ranks, experts]``."""
    has = np.zeros((len(maps), num_experts + 1), dtype=np.bool_)  # the last column takes the empty slots
    np.put_along_axis(has, np.where(maps == EMPTY_SLOT, num_experts, maps), values=True, axis=1)
    return has[:, :num_experts]


def keep_slots(held: Ints, wanted: Ints) -> Ints:
    """Order each rank's experts so that slots whose expert stays keep it: ``[ranks, slots]``.

    :param held: experts of each slot now, ``[ranks, slots]``
    :param wanted: experts of each rank, in any order, ``[ranks, slots]``
    """
    (held_order, held_key), (order, key) = _numbered(held), _numbered(wanted)  # all [ranks, slots], in ranked order
    # A replica stays where both have its number: as many of an expert as it has replicas on the rank in both.
    stays, placed = np.isin(held_key, key, assume_unique=True), np.isin(key, held_key, assume_unique=True)
    ranked = wanted[np.arange(len(held))[:, None], order]  # [ranks, slots], ascending
    result = np.empty_like(wanted)
    free = np.ones(held.shape, dtype=np.bool_)
    rank, place = np.nonzero(stays)  # [staying]
    slot = held_order[rank, place]  # [staying]
    result[rank, slot], free[rank, slot] = held[rank, slot], False
    result[free] = ranked[~placed]
    return result


def _numbered(maps: Ints) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """Return the slots of each rank in ascending expert, and a number for (rank, expert, how many before).

    :returns: both ``[ranks, slots]``
    """
    num_ranks, slots = maps.shape
    order = np.argsort(maps, axis=1, kind="stable")
    ranked = np.take_along_axis(maps, order, axis=1)
    begins = np.where(ranked != np.roll(ranked, 1, axis=1), np.arange(slots), 0)  # place of each expert's first replica
    before = np.arange(slots) - np.maximum.accumulate(begins, axis=1)
    rank = np.arange(num_ranks, dtype=np.int64)[:, None] << 32  # more than any expert, whatever type the maps have
    return order, (rank + ranked + 1) * slots + before


def linear_assignment() -> Assign:
    """Return scipy's linear assignment.

    :raises MissingExtra: without scipy
    """
    try:
        from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("relabel needs scipy; pip install 'async-eplb[planning]'", extra="planning") from error
    assign: Assign = linear_sum_assignment
    return assign
