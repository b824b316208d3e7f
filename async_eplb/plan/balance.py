"""Give each item to one of its permitted bins so that the fullest bin has as few as possible: an optimal semi-matching.

All layers are solved at once, each with its own limit. The limit starts at a lower bound. While a bin is over it,
one of its items moves along a shortest chain of moves towards a bin with room, as in the push-relabel method for
maximum flow (Goldberg and Tarjan, 1988). Where no chain leads to room, the bins that can be reached hold more than
the limit times their number, and items of theirs fit nowhere else: the limit was too low, and is raised by one. So
the result is optimal (semi-matchings: Harvey, Ladner, Lovász and Tamir, 2003).

Capped items, of which a bin has a limited number whatever room it has, are in a compartment of their bin. That is a
node of the flow network like a bin, with an arc to its bin whose capacity is the cap: the flow on it, what is in the
compartment up to the cap, counts for the bin; what is over the cap is excess of the compartment itself.
"""

import numpy as np
import numpy.typing as npt

from async_eplb.plan.transfers import Bools, Ints

_UNREACHABLE = np.iinfo(np.int32).max // 2


def balanced(
    start: npt.NDArray[np.intp],
    first: npt.NDArray[np.intp],
    count: npt.NDArray[np.intp],
    layer: Ints,
    bin_of: Ints,
    load: npt.NDArray[np.int64],
    capped: Bools | None = None,
    capped_load: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.intp]:
    """Choose an option for each item: ``[items]``. The same choice wherever it is computed.

    :param start: options to begin with; the better they are, the faster this is
    :param first: first of an item's options, which are consecutive; at least one
    :param count: how many it has
    :param layer: layer of each item
    :param bin_of: bin of each option, ``[options]``
    :param load: what each bin holds without these items, and without what is capped, ``[layers, bins]``
    :param capped: items that begin balanced: no bin shall have more of them than its layer's fullest has, ``[items]``
    :param capped_load: what each bin holds of such items without these, ``[layers, bins]``
    """
    chosen = start.copy()  # [items]
    shape, size = load.shape, load.size
    num_bins = shape[1]
    inner_load = np.zeros_like(load) if capped_load is None else capped_load  # [layers, bins]

    # Nodes are numbered: all bins of all layers, then all compartments in the same order, [2 * layers * bins].
    node = layer * np.int64(num_bins)  # [items]: bin 0 of the item's layer, or its compartment
    if capped is not None:
        node = node + size * capped
    place = node + bin_of[chosen]  # [items]: the node where each item is
    held = np.bincount(place, minlength=2 * size)  # [nodes]
    held += np.concatenate([load, inner_load]).reshape(-1)

    # No limit can be below the mean, below what is fixed in one bin, or below what a bin is allowed of capped items.
    most_capped = held[size:].reshape(shape).max(axis=1)  # [layers]
    cap = np.repeat(most_capped, num_bins)  # [layers * bins]
    mean = -(-held.reshape(2, *shape).sum(axis=(0, 2)) // num_bins)  # [layers], rounded up
    limit = np.maximum.reduce([mean, (load + inner_load).max(axis=1), most_capped])  # [layers]

    items = np.arange(len(start))  # of the layers that are not done
    while True:
        inner = np.minimum(held[size:], cap)  # [layers * bins]: flow from each compartment into its bin
        room = np.repeat(limit, num_bins) - held[:size] - inner  # [layers * bins]
        over = np.concatenate([room < 0, held[size:] > cap])  # [nodes]: those with excess
        active = np.asarray(over.reshape(2, *shape).any(axis=(0, 2)))  # [layers]
        if not active.any():
            return chosen

        # The arcs: every move that an item could make. A chain of them is shortest where each leads one node closer.
        items = items[active[layer[items]]]
        item, option = _options(items, first, count)  # [moves]
        source, target = place[item], node[item] + bin_of[option]  # [moves]: nodes
        own = np.flatnonzero(np.repeat(active, num_bins))  # bins of active layers
        enters, leaves = own[(held[size:] < cap)[own]], own[inner[own] > 0]
        distance = _moves_to_room(source, target, room > 0, enters, leaves)  # [nodes]

        # An excess that no chain takes to a bin with room proves that the layer's limit is too low.
        limit += (over & (distance == _UNREACHABLE)).reshape(2, *shape).any(axis=(0, 2))

        # A full bin whose shortest chain begins in its compartment takes its excess back from there.
        over[size:] |= over[:size] & (distance[size:] == distance[:size])
        moves = np.flatnonzero(over[source] & (distance[target] + 1 == distance[source]))
        # One move out of a bin and one into it at a time: after it, the others' distances may be other ones.
        for ends in (source, target):
            moves = moves[np.unique(ends[moves] % size, return_index=True)[1]]
        chosen[item[moves]], place[item[moves]] = option[moves], target[moves]
        np.subtract.at(held, source[moves], 1)
        np.add.at(held, target[moves], 1)


def _options(
    items: npt.NDArray[np.intp], first: npt.NDArray[np.intp], count: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """List each item with each of its options: two of ``[options of all]``."""
    number = count[items]  # [items]
    item = np.repeat(items, number)  # [options of all]
    shift = first[items] - (np.cumsum(number) - number)  # [items]: from the place in this list to the option
    return item, np.repeat(shift, number) + np.arange(len(item))


def _moves_to_room(source: Ints, target: Ints, room: Bools, enters: Ints, leaves: Ints) -> npt.NDArray[np.int64]:
    """Count the moves from each node to a bin with room, breadth first: ``[nodes]``.

    :param source: nodes that an item can leave, ``[moves]``
    :param target: where it gets by that, ``[moves]``
    :param room: which bins have some, ``[layers * bins]``
    :param enters: bins of which one more in the compartment is one more in the bin
    :param leaves: bins of which one less in the compartment is one less in the bin
    """
    distance = np.full(2 * len(room), _UNREACHABLE)  # [nodes]
    bins, inner = distance[: len(room)], distance[len(room) :]  # views, both [layers * bins]
    bins[room] = 0
    reached = -1
    while True:
        # Between a compartment and its bin no item moves: what is counted there only changes its node.
        inner[enters] = np.minimum(inner[enters], bins[enters])
        bins[leaves] = np.minimum(inner[leaves], bins[leaves])
        if (now := int((distance < _UNREACHABLE).sum())) == reached:
            return distance
        reached = now
        np.minimum.at(distance, source, np.minimum(distance[target] + 1, _UNREACHABLE))
