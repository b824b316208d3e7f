"""Who sends what: ways to choose the source of each transfer, with the same final weights."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from async_eplb.plan.balance import balanced
from async_eplb.plan.transfers import Ints, Needs, Transfers, in_chunks
from async_eplb.topology import EPTopology


def chunked(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Cut destinations into one chunk for each source, as :func:`plan_layer` does."""
    del num_layers, topology
    return needs.served_by(in_chunks(needs))


def evened(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Take from the own node where that has the expert, and from the least busy ranks.

    The rank that sends most across nodes sends as little as is possible; then, with that given, the rank that sends
    most in all does.
    """
    holder = in_chunks(needs)
    nothing = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
    far = np.flatnonzero(~needs.same_node)
    _even_out(needs, holder, far, nothing)
    across = _add(nothing, needs.layer[far], needs.holder_rank[holder[far]])
    _even_out(needs, holder, np.flatnonzero(needs.same_node), across)
    return needs.served_by(holder)


def relayed(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Let an expert that several ranks of a node need cross nodes once; who gets it passes it on, in a second stage.

    Sources across nodes are evened out as by :func:`evened`. Among the ranks of a node that need the expert, the one
    that it crosses to is chosen so that the rank that receives most across nodes receives as little as is possible.
    """
    nothing = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
    holder = in_chunks(needs)
    far = np.flatnonzero(~needs.same_node)
    starts = _crossings(needs, far, topology)
    sizes = np.diff(starts, append=len(far))
    gateway = balanced(starts, starts, sizes, needs.layer[far[starts]], needs.rank[far], nothing)
    crossing, passed_from = far[gateway], np.repeat(far[gateway], sizes)
    later = far != passed_from
    later, passed_from = far[later], passed_from[later]

    _even_out(needs, holder, crossing, nothing)
    load = _add(nothing, needs.layer[crossing], needs.holder_rank[holder[crossing]])
    load = _add(load, needs.layer[later], needs.rank[passed_from])
    _even_out(needs, holder, np.flatnonzero(needs.same_node), load)

    once = needs.served_by(holder)
    src_rank, src_slot, same_node = once.src_rank, once.src_slot, once.same_node.copy()
    src_rank[later], src_slot[later], same_node[later] = needs.rank[passed_from], needs.slot[passed_from], True
    relayed_ = np.zeros(len(holder), dtype=np.bool_)
    relayed_[later] = True
    stage = relayed_.astype(np.int32)
    transfers = replace(once, src_rank=src_rank, src_slot=src_slot, same_node=same_node, relayed=relayed_, stage=stage)
    return transfers.take(np.lexsort((stage, needs.layer)))


def _crossings(needs: Needs, far: npt.NDArray[np.intp], topology: EPTopology) -> npt.NDArray[np.intp]:
    """Return where, among the needs ``far``, those of one expert and one node begin."""
    begins = np.ones(len(far), dtype=np.bool_)
    for column in (needs.layer, needs.logical_expert, needs.rank // topology.num_ranks_per_node):
        begins[1:] &= column[far[1:]] == column[far[:-1]]
    begins[1:] = ~begins[1:]
    return np.flatnonzero(begins)


def _even_out(
    needs: Needs, holder: npt.NDArray[np.intp], rows: npt.NDArray[np.intp], load: npt.NDArray[np.int64]
) -> None:
    """Choose the holders of some needs so that the busiest rank sends as little as possible.

    :param holder: changed in place, ``[needs]``
    :param load: what ranks send besides, ``[layers, ranks]``
    """
    first, count, layer = needs.first[rows], needs.count[rows], needs.layer[rows]
    holder[rows] = balanced(holder[rows], first, count, layer, needs.holder_rank, load)


def _add(load: npt.NDArray[np.int64], layer: Ints, rank: Ints) -> npt.NDArray[np.int64]:
    """Return a load with one transfer more for each entry."""
    num_layers, num_ranks = load.shape
    more = np.bincount(layer * np.int64(num_ranks) + rank, minlength=load.size)
    return np.asarray(load + more.reshape(num_layers, num_ranks))


SOURCES: dict[str, Callable[[Needs, int, EPTopology], Transfers]] = {
    "chunked": chunked,
    "balanced": evened,
    "relayed": relayed,
}
