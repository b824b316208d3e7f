"""DeepSeek's published expert parallelism load balancer (EPLB, 2025), for all layers at once.

Groups of experts are packed to nodes, hot experts are replicated within their node, replicas are packed to ranks. The
description and the example are in the README of https://github.com/deepseek-ai/eplb; the code here is our own.

Placements equal the published ones slot by slot: loads, shares and sums of packs are float32, and of equal packs and
equally hot experts the lowest index is taken. Two things that the published code leaves to the machine are fixed here:
items of equal load are packed in index order (its sort is stable or not, by size and by version of torch), and the load
of a group is summed in float64 and rounded once (its sum depends on the processor where it is not exact).
"""

import numpy as np
import numpy.typing as npt
from einops import rearrange, repeat

from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.objective import IntArray
from async_eplb.topology import EPTopology

Weight = npt.NDArray[np.float32]


def place_groups(load: ExpertLoad, groups: IntArray, topology: EPTopology) -> ExpertPlacement:
    """Replicate and place experts within nodes, given which groups are on which.

    :param groups: int64 ``[layers, groups]``: the first ``groups / num_nodes`` of a row are on node 0, and so on
    """
    layers, num_groups = groups.shape
    nodes = topology.num_nodes
    members = np.arange(load.num_logical_experts).reshape(num_groups, -1)  # [groups, experts of a group]
    # A row of what follows is one node of one layer.
    experts = rearrange(
        members[groups], "layers (nodes groups) experts -> (layers nodes) (groups experts)", nodes=nodes
    )
    of_layer = repeat(np.arange(layers), "layers -> (layers nodes) 1", nodes=nodes)
    weight = load.tokens.astype(np.float32)[of_layer, experts]  # [rows, experts of a node]
    replicas, share = replicate(weight, topology.num_physical_experts // nodes)  # [rows, replicas], [rows, experts]
    order = pack(np.take_along_axis(share, replicas, axis=1), topology.num_ranks_per_node)  # [rows, replicas]
    placed = np.take_along_axis(experts, np.take_along_axis(replicas, order, axis=1), axis=1)  # [rows, replicas]
    maps = rearrange(placed, "(layers nodes) slots -> layers (nodes slots)", nodes=nodes)
    return ExpertPlacement.from_mapping(maps, load.num_logical_experts)


def pack(weight: Weight, num_packs: int) -> IntArray:
    """Pack items into packs of equally many: the heaviest first, each into the lightest pack that has room.

    :param weight: float32 ``[rows, items]``
    :returns: the items in pack order, int64 ``[rows, items]``: those of pack 0 as they came in, then of pack 1, ...
    """
    rows, items = weight.shape
    room = items // num_packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1))
    order = np.argsort(-weight, axis=1, kind="stable")  # [rows, items], heaviest first
    # One step of the loop packs one item in every row; copies make each step's columns contiguous: [items, rows].
    columns = zip(order.T.copy(), np.take_along_axis(weight, order, axis=1).T.copy(), strict=True)
    filled = np.zeros(rows * num_packs, dtype=np.int64)  # [rows * packs]: items in each
    total = np.zeros((rows, num_packs), dtype=np.float32)  # infinite where a pack is full
    flat_total = total.reshape(-1)  # a view
    packed = np.empty(rows * items, dtype=np.int64)  # [rows * packs * room]
    first_pack, first_item = np.arange(rows) * num_packs, np.arange(rows) * items  # [rows]
    for item, item_weight in columns:
        pack_index = total.argmin(axis=1)  # [rows]
        at = first_pack + pack_index
        place = filled[at]
        packed[first_item + pack_index * room + place] = item
        filled[at] = place + 1
        flat_total[at] = np.where(place + 1 == room, np.float32(np.inf), flat_total[at] + item_weight)
    return packed.reshape(rows, items)


def replicate(weight: Weight, num_replicas: int) -> tuple[IntArray, Weight]:
    """Give each expert a replica, and each further replica to the expert with the most load a replica.

    :param weight: float32 ``[rows, experts]``
    :returns: the expert of each replica, int64 ``[rows, replicas]``, and the load of one replica of each expert,
        float32 ``[rows, experts]``
    """
    rows, experts = weight.shape
    replicas = np.empty((rows, num_replicas), dtype=np.int64)
    replicas[:, :experts] = np.arange(experts)
    count = np.ones((rows, experts), dtype=np.float32)
    share = weight.copy()  # [rows, experts]
    every_row = np.arange(rows)
    for replica in range(experts, num_replicas):
        hottest = share.argmax(axis=1)  # [rows]
        replicas[:, replica] = hottest
        count[every_row, hottest] += 1
        share[every_row, hottest] = weight[every_row, hottest] / count[every_row, hottest]
    return replicas, share
