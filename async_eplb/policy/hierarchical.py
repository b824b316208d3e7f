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

from async_eplb.errors import InvalidOptions
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.check import require_room
from async_eplb.policy.objective import IntArray
from async_eplb.topology import EPTopology

Weight = npt.NDArray[np.float32]


def hierarchical(load: ExpertLoad, topology: EPTopology, *, num_groups: int) -> ExpertPlacement:
    """Place experts group by group: each group on one node, balanced over nodes, then over the ranks of a node.

    Groups are consecutive experts, equally many each. Where they do not divide over the nodes, the published code
    places experts as :func:`global_` does, and so does this.

    :param load: of each expert
    :param num_groups: groups that the router limits tokens to, so that traffic stays within nodes
    :raises InvalidOptions: if the groups do not divide the experts
    :raises TooFewSlots: if there are fewer slots than experts
    """
    require_room(load, topology)
    require_groups(num_groups, load.num_logical_experts)
    if num_groups % topology.num_nodes:
        return global_(load, topology)
    groups = pack(_group_sums(load, num_groups), topology.num_nodes)
    return place_groups(load, groups, topology)


def global_(load: ExpertLoad, topology: EPTopology) -> ExpertPlacement:
    """Place experts regardless of groups and nodes: replicate the hottest, then balance over all ranks.

    :raises TooFewSlots: if there are fewer slots than experts
    """
    require_room(load, topology)
    one_node = EPTopology(topology.num_ranks, 1, topology.num_local_physical_experts)
    return place_groups(load, np.zeros((load.num_layers, 1), dtype=np.int64), one_node)


def place_groups(load: ExpertLoad, groups: IntArray, topology: EPTopology) -> ExpertPlacement:
    """Replicate and place experts within nodes, given which groups are on which.

    :param groups: int64 ``[layers, groups]``: the first ``groups / num_nodes`` of a row are on node 0, and so on
    """
    layers, num_groups = groups.shape
    nodes = topology.num_nodes
    members = np.arange(load.num_logical_experts).reshape(num_groups, -1)
    experts = members[groups].reshape(layers * nodes, -1)
    rows = np.repeat(np.arange(layers), nodes)[:, None]
    weight = load.tokens.astype(np.float32)[rows, experts]
    replicas, share = replicate(weight, topology.num_physical_experts // nodes)
    order = pack(np.take_along_axis(share, replicas, axis=1), topology.num_ranks_per_node)
    placed = np.take_along_axis(experts, np.take_along_axis(replicas, order, axis=1), axis=1)
    return ExpertPlacement.from_mapping(placed.reshape(layers, -1), load.num_logical_experts)


def pack(weight: Weight, num_packs: int) -> IntArray:
    """Pack items into packs of equally many: the heaviest first, each into the lightest pack that has room.

    :param weight: float32 ``[rows, items]``
    :returns: the items in pack order, int64 ``[rows, items]``: those of pack 0 as they came in, then of pack 1, ...
    """
    rows, items = weight.shape
    room = items // num_packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1))
    order = np.argsort(-weight, axis=1, kind="stable")
    columns = zip(order.T.copy(), np.take_along_axis(weight, order, axis=1).T.copy(), strict=True)
    filled = np.zeros(rows * num_packs, dtype=np.int64)
    total = np.zeros((rows, num_packs), dtype=np.float32)
    flat_total = total.reshape(-1)
    packed = np.empty(rows * items, dtype=np.int64)
    first_pack, first_item = np.arange(rows) * num_packs, np.arange(rows) * items
    for item, item_weight in columns:
        pack_index = total.argmin(axis=1)
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
    share = weight.copy()
    every_row = np.arange(rows)
    for replica in range(experts, num_replicas):
        hottest = share.argmax(axis=1)
        replicas[:, replica] = hottest
        count[every_row, hottest] += 1
        share[every_row, hottest] = weight[every_row, hottest] / count[every_row, hottest]
    return replicas, share


def require_groups(num_groups: int, num_logical_experts: int) -> None:
    """Check that groups are equally large.

    :raises InvalidOptions: if not
    """
    if num_groups < 1 or num_logical_experts % num_groups:
        raise InvalidOptions(
            f"{num_groups} groups do not divide {num_logical_experts} logical experts; every group needs as many",
            option="num_groups",
        )


def _group_sums(load: ExpertLoad, num_groups: int) -> Weight:
    rounded = load.tokens.astype(np.float32).reshape(load.num_layers, num_groups, -1)
    return np.asarray(rounded.sum(axis=2, dtype=np.float64), dtype=np.float32)
