"""Every event of an update is made here."""

from collections.abc import Iterable

from async_eplb.events.schema import LayerTransferred
from async_eplb.plan import LayerPlan
from async_eplb.topology import EPTopology


def transfer_event(
    plan: LayerPlan,
    topology: EPTopology,
    rank: int,
    *,
    layer: int,
    generation: int,
    step: int,
    expert_nbytes: int,
    ms: float,
) -> LayerTransferred:
    """Return what a layer's transfer moved, per direction and by peer rank and node.

    :param expert_nbytes: bytes of one expert in all tensors of the layer
    """
    sent = _nbytes_by_rank([send.dst_rank for send in (*plan.sends, *plan.relays)], expert_nbytes)
    received = _nbytes_by_rank([recv.src_rank for recv in plan.recvs], expert_nbytes)
    sent_nodes, received_nodes = _by_node(sent, topology), _by_node(received, topology)
    sent_nbytes, received_nbytes = sum(sent.values()), sum(received.values())
    node = topology.node_of(rank)
    return LayerTransferred(
        generation=generation,
        rank=rank,
        layer=layer,
        step=step,
        duration_ms=ms,
        copied_nbytes=len(plan.local_copies) * expert_nbytes,
        sent_nbytes=sent_nbytes,
        sent_to_ranks=list(sent),
        sent_nbytes_by_rank=list(sent.values()),
        sent_nbytes_by_node=sent_nodes,
        sent_nbytes_within_node=sent_nodes[node],
        sent_nbytes_across_nodes=sent_nbytes - sent_nodes[node],
        received_nbytes=received_nbytes,
        received_from_ranks=list(received),
        received_nbytes_by_rank=list(received.values()),
        received_nbytes_by_node=received_nodes,
        received_nbytes_within_node=received_nodes[node],
        received_nbytes_across_nodes=received_nbytes - received_nodes[node],
    )


def _nbytes_by_rank(peers: Iterable[int], expert_nbytes: int) -> dict[int, int]:
    nbytes: dict[int, int] = {}
    for peer in sorted(peers):
        nbytes[peer] = nbytes.get(peer, 0) + expert_nbytes
    return nbytes


def _by_node(nbytes_by_rank: dict[int, int], topology: EPTopology) -> list[int]:
    nodes = [0] * topology.num_nodes
    ranks_per_node = topology.num_ranks_per_node
    for rank, nbytes in nbytes_by_rank.items():
        nodes[rank // ranks_per_node] += nbytes
    return nodes
