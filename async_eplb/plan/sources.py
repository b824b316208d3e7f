"""Who sends what: ways to choose the source of each transfer, with the same final weights."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from async_eplb.plan.balance import balanced
from async_eplb.plan.transfers import Bools, Ints, Needs, Transfers, in_chunks
from async_eplb.topology import EPTopology


def chunked(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Cut destinations into one chunk for each source, as :func:`plan_layer` does."""
    del num_layers, topology
    return needs.served_by(in_chunks(needs))


def evened(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Take from the own node where that has the expert, and from the least busy ranks.

    The rank that sends most across nodes sends as little as is possible; and of all choices of which that is true, this
    is one in which the rank that sends most in all sends as little as is possible. Where nothing crosses, that is the
    least of all choices. Where experts cross it need not be: of two ranks that both hold six experts which another node
    needs, one of which alone has six for its own node, each sends three across and that one sends nine, although it
    could send six if the other sent six across. No choice has both within one of the least.
    """
    holder = in_chunks(needs)
    _even_out(needs, holder, ~needs.same_node, np.zeros((num_layers, topology.num_ranks), dtype=np.int64))
    return needs.served_by(holder)


def relayed(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Let an expert that several ranks of a node need cross nodes once; who gets it passes it on, in a second stage.

    Among the ranks of a node that need the expert, the one that it crosses to is chosen so that the rank that receives
    most across nodes receives as little as is possible. What is passed on is given by that; the sources of the rest are
    evened out as by :func:`evened`.
    """
    shape = num_layers, topology.num_ranks
    holder = in_chunks(needs)
    far = np.flatnonzero(~needs.same_node)
    starts = _crossings(needs, far, topology)
    sizes = np.diff(starts, append=len(far))
    gateway, layer, rank = starts.copy(), needs.layer[far], needs.rank[far]
    alone, free = starts[sizes == 1], sizes > 1
    received = _count(shape, layer[alone], rank[alone])
    gateway[free] = balanced(starts[free], starts[free], sizes[free], layer[starts[free]], rank, received)
    crossing, passed_from = far[gateway], np.repeat(far[gateway], sizes)
    later = far != passed_from
    later, passed_from = far[later], passed_from[later]

    crosses = np.zeros(len(holder), dtype=np.bool_)
    crosses[crossing] = True
    _even_out(needs, holder, crosses, _count(shape, needs.layer[later], needs.rank[passed_from]))

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


def _even_out(needs: Needs, holder: npt.NDArray[np.intp], crosses: Bools, load: npt.NDArray[np.int64]) -> None:
    """Choose holders so that the busiest rank sends as little as possible: across nodes, then, with that given, in all.

    :param holder: changed in place, ``[needs]``
    :param crosses: needs that are served across nodes, ``[needs]``
    :param load: what ranks send for needs that are served neither across nodes nor within, ``[layers, ranks]``
    """
    fixed = needs.count == 1
    within, across = (
        _count(load.shape, needs.layer[rows], needs.holder_rank[needs.first[rows]])
        for rows in (np.flatnonzero(fixed & needs.same_node), np.flatnonzero(fixed & crosses))
    )
    free_crossing, free = np.flatnonzero(crosses & ~fixed), np.flatnonzero((crosses | needs.same_node) & ~fixed)
    holder[free_crossing] = balanced(*_choices(needs, holder, free_crossing), across)
    holder[free] = balanced(*_choices(needs, holder, free), load + within, crosses[free], across)


def _choices(
    needs: Needs, holder: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp], Ints, Ints]:
    """Return the holders of some needs, and which there are, as :func:`balanced` takes them."""
    return holder[rows], needs.first[rows], needs.count[rows], needs.layer[rows], needs.holder_rank


def _count(shape: tuple[int, ...], layer: Ints, rank: Ints) -> npt.NDArray[np.int64]:
    """Count entries by layer and rank: ``[layers, ranks]``."""
    num_layers, num_ranks = shape
    counts = np.bincount(layer * np.int64(num_ranks) + rank, minlength=num_layers * num_ranks)
    return counts.reshape(num_layers, num_ranks)


SOURCES: dict[str, Callable[[Needs, int, EPTopology], Transfers]] = {
    "chunked": chunked,
    "balanced": evened,
    "relayed": relayed,
}
