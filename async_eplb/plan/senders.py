"""Choose the sender of each transfer in one of several ways, with the same final weights."""

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
    """Take experts from the own node where it has them, and from the least busy ranks.

    First, the rank that sends most across nodes sends as little as possible. Then, with that given, the rank that sends
    most in all sends as little as possible. Where nothing crosses nodes, no choice has a lower maximum. Where experts
    cross, one may: of two ranks that both hold six experts which another node needs, one of which alone has six for its
    own node, each sends three across and that one sends nine, although it could send six if the other sent six across.
    No choice has both within one of the least.
    """
    holder = in_chunks(needs)  # [needs]
    _even_out(needs, holder, ~needs.same_node, np.zeros((num_layers, topology.num_ranks), dtype=np.int64))
    return needs.served_by(holder)


def relayed(needs: Needs, num_layers: int, topology: EPTopology) -> Transfers:
    """Let an expert that several ranks of a node need cross nodes once; its receiver there passes it on afterwards.

    Among the ranks of a node that need the expert, the one that it crosses to is chosen so that the rank that receives
    most across nodes receives as little as possible. What is passed on follows from that; the sources of the rest are
    evened out as by :func:`evened`.
    """
    shape = num_layers, topology.num_ranks
    holder = in_chunks(needs)  # [needs]
    far = np.flatnonzero(~needs.same_node)  # [far]: needs of one expert and one node are neighbours, a *crossing*
    starts = _crossings(needs, far, topology)  # [crossings], places in ``far``
    sizes = np.diff(starts, append=len(far))  # [crossings]: ranks of the node that need the expert

    # The gateway of a crossing is the rank that receives it. Where only one rank needs the expert, there is no choice.
    gateway = starts.copy()  # [crossings], places in ``far``
    layer, rank = needs.layer[far], needs.rank[far]  # [far]
    alone, free = starts[sizes == 1], sizes > 1
    received = _count(shape, layer[alone], rank[alone])  # [layers, ranks]
    gateway[free] = balanced(starts[free], starts[free], sizes[free], layer[starts[free]], rank, received)
    crossing, passed_from = far[gateway], np.repeat(far[gateway], sizes)  # [crossings], [far]: needs
    later = far != passed_from  # [far]: not a gateway, so it receives from one
    later, passed_from = far[later], passed_from[later]  # [passed on]: needs

    crosses = np.zeros(len(holder), dtype=np.bool_)  # [needs]
    crosses[crossing] = True
    _even_out(needs, holder, crosses, _count(shape, needs.layer[later], needs.rank[passed_from]))

    once = needs.served_by(holder)
    src_rank, src_slot, same_node, passed_on = once.src_rank, once.src_slot, once.same_node.copy(), once.relayed
    src_rank[later], src_slot[later], same_node[later] = needs.rank[passed_from], needs.slot[passed_from], True
    passed_on[later] = True
    transfers = replace(once, src_rank=src_rank, src_slot=src_slot, same_node=same_node, relayed=passed_on)
    return transfers.take(np.lexsort((passed_on, needs.layer)))  # in each layer what is passed on comes last


def _crossings(needs: Needs, far: npt.NDArray[np.intp], topology: EPTopology) -> npt.NDArray[np.intp]:
    """Return where, among the needs ``far``, those of one expert and one node begin: ``[crossings]``."""
    same = np.zeros(len(far), dtype=np.bool_)  # [far]: as the one before it
    same[1:] = True
    for column in (needs.layer, needs.logical_expert, needs.rank // topology.num_ranks_per_node):
        same[1:] &= column[far[1:]] == column[far[:-1]]
    return np.flatnonzero(~same)


def _even_out(needs: Needs, holder: npt.NDArray[np.intp], crosses: Bools, load: npt.NDArray[np.int64]) -> None:
    """Choose holders so that the busiest rank sends as little as possible: across nodes, then, with that given, in all.

    :param holder: changed in place, ``[needs]``
    :param crosses: needs that are served across nodes, ``[needs]``
    :param load: what ranks send for needs that are served neither across nodes nor within, ``[layers, ranks]``
    """
    fixed = needs.count == 1  # [needs]: no choice
    within, across = (  # both [layers, ranks]
        _count(load.shape, needs.layer[rows], needs.holders.rank[needs.first[rows]])
        for rows in (np.flatnonzero(fixed & needs.same_node), np.flatnonzero(fixed & crosses))
    )
    free_crossing, free = np.flatnonzero(crosses & ~fixed), np.flatnonzero((crosses | needs.same_node) & ~fixed)
    holder[free_crossing] = balanced(*_choices(needs, holder, free_crossing), across)
    # Once more all that can be chosen: now no rank may send more across nodes than the busiest one does.
    holder[free] = balanced(*_choices(needs, holder, free), load + within, crosses[free], across)


def _choices(
    needs: Needs, holder: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp], Ints, Ints]:
    """Return the holders of some needs, and which there are, as :func:`balanced` takes them."""
    return holder[rows], needs.first[rows], needs.count[rows], needs.layer[rows], needs.holders.rank


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
"""The option ``sources`` of a :class:`Planner` → its function."""
