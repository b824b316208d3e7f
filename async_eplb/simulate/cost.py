"""Model how long each layer's transfers take on a cluster, and how long they must take at least."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from einops import reduce

from async_eplb.plan import Needs, Transfers
from async_eplb.plan.transfers import Ints
from async_eplb.simulate.clusters import Cluster, Link
from async_eplb.topology import EPTopology

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCosts:
    """Time and bytes of each layer's transfers; arrays are ``[layers]``.

    :param time_s: seconds until the slowest rank has received and sent all of the layer's first hop and of the second
        hop of the layer before; of the last layer, its own second hop too
    :param nbytes_within: of all ranks, inside nodes
    :param nbytes_across: of all ranks, between nodes
    :param busiest_rank: the one that sends or receives longest in this time
    :param num_stages: hops that are posted one after another
    """

    time_s: Floats
    nbytes_within: Counts
    nbytes_across: Counts
    busiest_rank: npt.NDArray[np.intp]
    num_stages: Counts


def layer_costs(
    transfers: Transfers, num_layers: int, topology: EPTopology, cluster: Cluster, expert_nbytes: int
) -> LayerCosts:
    """Return the costs of an update's layers, one after another, each relayed beside the first hop of the next.

    A turn is the first hop of a layer together with the second hop, what is relayed, of the layer before: both share
    links. It takes the latency of the slowest link used, and as long as the busiest rank's link inside its node,
    the busiest rank's link to other nodes, or the busiest node's, whichever is longest. The two links of a rank work at
    once. A turn begins when the last one has ended everywhere. The last layer's second hop has a turn of its own.
    """
    num_ranks, num_turns = topology.num_ranks, num_layers + 1
    turn = transfers.layer + transfers.relayed  # [transfers]
    across = ~transfers.same_node  # [transfers]

    def counted(chosen: npt.NDArray[np.bool_], ranks: Ints) -> Counts:
        return _counts(turn[chosen], ranks[chosen], num_turns, num_ranks)

    # Experts of each rank: all [turns, ranks].
    near_out, near_in = counted(~across, transfers.src_rank), counted(~across, transfers.dst_rank)
    far_out, far_in = counted(across, transfers.src_rank), counted(across, transfers.dst_rank)
    near_s = _link_s(cluster.within, near_out, near_in, expert_nbytes)
    far_s = _link_s(cluster.across, far_out, far_in, expert_nbytes)
    rank_s = np.maximum(near_s, far_s)
    of_nodes = (
        reduce(far, "turns (nodes ranks) -> turns nodes", "sum", nodes=topology.num_nodes) for far in (far_out, far_in)
    )
    node_s = np.maximum(*of_nodes) * expert_nbytes / cluster.node_bytes_per_s  # [turns, nodes]
    crosses, moves = far_out.any(axis=1), near_out.any(axis=1)  # [turns]
    latency_s = np.select([crosses, moves], [cluster.across.latency_s, cluster.within.latency_s], 0.0)  # [turns]
    turn_s = latency_s + np.maximum(rank_s.max(axis=1), node_s.max(axis=1))  # [turns]

    hops = np.zeros((num_layers, 2), dtype=np.bool_)  # which a layer has
    hops[transfers.layer, transfers.relayed.astype(np.intp)] = True
    moved = [np.bincount(transfers.layer[chosen], minlength=num_layers) * expert_nbytes for chosen in (~across, across)]
    return LayerCosts(
        time_s=_of_layers(turn_s),
        nbytes_within=moved[0],
        nbytes_across=moved[1],
        busiest_rank=_of_layers(rank_s).argmax(axis=1),
        num_stages=hops.sum(axis=1),
    )


def lower_bounds(needs: Needs, num_layers: int, topology: EPTopology, cluster: Cluster, expert_nbytes: int) -> Floats:
    """Return the least time that any plan takes in which ranks receive only what they need: seconds ``[layers]``.

    Each node must receive every expert that it lacks once: at best spread evenly over its ranks, but one that a single
    rank of the node needs goes to that rank; and one that a single rank holds comes from that rank. Each rank must
    receive from its node what another rank there holds.
    """
    num_ranks, per_node = topology.num_ranks, topology.num_ranks_per_node
    far = np.flatnonzero(~needs.same_node)  # needs that cross nodes
    node = needs.rank[far] // per_node  # [far]
    experts = int(needs.logical_expert.max(initial=0)) + 1
    key = (needs.layer[far] * np.int64(topology.num_nodes) + node) * experts + needs.logical_expert[far]  # [far]
    # A crossing is one expert of a layer that goes to one node, where ``takers`` ranks need it.
    _, first, takers = np.unique(key, return_index=True, return_counts=True)  # [crossings]
    crossing = far[first]
    layer, holder = needs.layer[crossing], needs.holders.rank[needs.first[crossing]]  # [crossings]
    into_node = _counts(layer, node[first], num_layers, topology.num_nodes)  # [layers, nodes]
    alone, held_once = takers == 1, needs.count[crossing] == 1  # [crossings]
    in_alone = _counts(layer[alone], needs.rank[crossing][alone], num_layers, num_ranks)  # [layers, ranks]
    out_alone = _counts(layer[held_once], holder[held_once], num_layers, num_ranks)  # [layers, ranks]

    # Experts that the busiest rank's link to other nodes, and its link inside the node, must carry: [layers].
    evenly = np.maximum(-(-into_node.max(axis=1) // per_node), -(-into_node.sum(axis=1) // num_ranks))
    of_one_rank = np.maximum.reduce([in_alone.max(axis=1), out_alone.max(axis=1), evenly])
    near = _counts(needs.layer[needs.same_node], needs.rank[needs.same_node], num_layers, num_ranks).max(axis=1)
    far_s = np.maximum(of_one_rank / cluster.across.bytes_per_s, into_node.max(axis=1) / cluster.node_bytes_per_s)
    near_s = near / cluster.within.bytes_per_s
    latency_s = np.where(of_one_rank > 0, cluster.across.latency_s, np.where(near > 0, cluster.within.latency_s, 0.0))
    return np.asarray(latency_s + np.maximum(far_s, near_s) * expert_nbytes)


def _of_layers(of_turns: Floats) -> Floats:
    """Add the last turn to the one before, so that there are as many as layers: from ``[turns, ...]``."""
    of_layers = of_turns[:-1].copy()
    of_layers[-1] += of_turns[-1]
    return of_layers


def _counts(layer: Ints, bins: Ints, num_layers: int, num_bins: int) -> Counts:
    """Count entries by layer, or turn, and bin: ``[layers, bins]``."""
    counts = np.bincount(layer * np.int64(num_bins) + bins, minlength=num_layers * num_bins)
    return np.asarray(counts.reshape(num_layers, num_bins))


def _link_s(link: Link, sent: Counts, received: Counts, expert_nbytes: int) -> Floats:
    """Return how long each rank's link is busy with what it sends and receives: seconds, of the same shape."""
    experts = np.maximum(sent, received) if link.full_duplex else sent + received
    return np.asarray(experts * (expert_nbytes / link.bytes_per_s))
