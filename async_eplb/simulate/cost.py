"""How long a layer's transfers take on a cluster, and how long they must take at least. Arrays of all layers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_eplb.plan import Needs, Transfers
from async_eplb.plan.transfers import Ints
from async_eplb.simulate.clusters import Cluster, Link
from async_eplb.topology import EPTopology

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCosts:
    """What each layer takes; arrays are ``[layers]``.

    :param time_s: its turn, until the slowest rank has received and sent all of its first hop and of the second hop of
        the layer before; of the last layer, its own second hop too
    :param nbytes_within: of all ranks, inside nodes
    :param nbytes_across: of all ranks, between nodes
    :param busiest_rank: the one that sends or receives longest in this turn
    :param num_stages: that are posted one after another
    """

    time_s: Floats
    nbytes_within: Counts
    nbytes_across: Counts
    busiest_rank: npt.NDArray[np.intp]
    num_stages: Counts


def layer_costs(
    transfers: Transfers, num_layers: int, topology: EPTopology, cluster: Cluster, expert_nbytes: int
) -> LayerCosts:
    """Return what an update's layers take, one after another, each passed on beside the first hop of the next.

    A stage takes the latency of the slowest link that it uses, and as long as the busiest rank's link inside its node,
    the busiest rank's link to other nodes, or the busiest node's, whichever is longest; a stage begins when the last
    one has ended everywhere. The two links work at once. What is passed on shares stages, and links, with the first
    hop of the next layer.
    """
    num_ranks = topology.num_ranks
    stages_of_layer = 1 + np.int64(transfers.stage.max(initial=0))
    first_relay = transfers.stage[transfers.relayed].min(initial=stages_of_layer)
    beside = transfers.stage - np.where(transfers.relayed, first_relay, 0)
    key = (transfers.layer + transfers.relayed) * stages_of_layer + beside
    stage, stage_of = np.unique(key, return_inverse=True)
    turn = np.minimum(stage // stages_of_layer, num_layers - 1)
    across = ~transfers.same_node

    def counted(chosen: npt.NDArray[np.bool_], ranks: Ints) -> Counts:
        return _counts(stage_of[chosen], ranks[chosen], len(stage), num_ranks)

    near_out, near_in = counted(~across, transfers.src_rank), counted(~across, transfers.dst_rank)
    far_out, far_in = counted(across, transfers.src_rank), counted(across, transfers.dst_rank)
    near_s = _link_s(cluster.within, near_out, near_in, expert_nbytes)
    far_s = _link_s(cluster.across, far_out, far_in, expert_nbytes)
    rank_s = np.maximum(near_s, far_s)
    nodes = (len(stage), topology.num_nodes, topology.num_ranks_per_node)
    node_nbytes = np.maximum(*(far.reshape(nodes).sum(axis=2).max(axis=1, initial=0) for far in (far_out, far_in)))
    latency_s = np.where(far_out.any(axis=1), cluster.across.latency_s, cluster.within.latency_s)
    slowest = np.maximum(rank_s.max(axis=1, initial=0), node_nbytes * expert_nbytes / cluster.node_bytes_per_s)

    time_s = np.zeros(num_layers)
    np.add.at(time_s, turn, latency_s + slowest)
    rank_total = np.zeros((num_layers, num_ranks))
    np.add.at(rank_total, turn, rank_s)
    moved = [np.bincount(transfers.layer[chosen], minlength=num_layers) * expert_nbytes for chosen in (~across, across)]
    posted = np.unique(transfers.layer * stages_of_layer + transfers.stage)
    return LayerCosts(
        time_s=time_s,
        nbytes_within=moved[0],
        nbytes_across=moved[1],
        busiest_rank=rank_total.argmax(axis=1),
        num_stages=np.bincount(posted // stages_of_layer, minlength=num_layers),
    )


def lower_bounds(needs: Needs, num_layers: int, topology: EPTopology, cluster: Cluster, expert_nbytes: int) -> Floats:
    """Return what no plan can beat in which a rank receives only what it needs: seconds ``[layers]``.

    Each node must receive every expert that it lacks once: at best spread evenly over its ranks, but one that a single
    rank of the node needs goes to that rank; and one that a single rank holds comes from that rank. Each rank must
    receive from its node what another rank there holds.
    """
    num_ranks, per_node = topology.num_ranks, topology.num_ranks_per_node
    far = np.flatnonzero(~needs.same_node)
    node = needs.rank[far] // per_node
    experts = int(needs.logical_expert.max(initial=0)) + 1
    key = (needs.layer[far] * np.int64(topology.num_nodes) + node) * experts + needs.logical_expert[far]
    _, first, takers = np.unique(key, return_index=True, return_counts=True)
    crossing = far[first]
    layer, holder = needs.layer[crossing], needs.holder_rank[needs.first[crossing]]
    into_node = _counts(layer, node[first], num_layers, topology.num_nodes)
    alone, held_once = takers == 1, needs.count[crossing] == 1
    in_alone = _counts(layer[alone], needs.rank[crossing][alone], num_layers, num_ranks)
    out_alone = _counts(layer[held_once], holder[held_once], num_layers, num_ranks)
    evenly = np.maximum(-(-into_node.max(axis=1) // per_node), -(-into_node.sum(axis=1) // num_ranks))
    of_one_rank = np.maximum.reduce([in_alone.max(axis=1), out_alone.max(axis=1), evenly])
    near = _counts(needs.layer[needs.same_node], needs.rank[needs.same_node], num_layers, num_ranks).max(axis=1)

    far_s = np.maximum(of_one_rank / cluster.across.bytes_per_s, into_node.max(axis=1) / cluster.node_bytes_per_s)
    near_s = near / cluster.within.bytes_per_s
    latency_s = np.where(of_one_rank > 0, cluster.across.latency_s, np.where(near > 0, cluster.within.latency_s, 0.0))
    return np.asarray(latency_s + np.maximum(far_s, near_s) * expert_nbytes)


def _counts(layer: Ints, bins: Ints, num_layers: int, num_bins: int) -> Counts:
    """Count entries by layer and bin: ``[layers, bins]``."""
    counts = np.bincount(layer * np.int64(num_bins) + bins, minlength=num_layers * num_bins)
    return np.asarray(counts.reshape(num_layers, num_bins))


def _link_s(link: Link, sent: Counts, received: Counts, expert_nbytes: int) -> Floats:
    """Return how long each rank's link is busy: seconds, of the same shape."""
    experts = np.maximum(sent, received) if link.full_duplex else sent + received
    return np.asarray(experts * (expert_nbytes / link.bytes_per_s))
