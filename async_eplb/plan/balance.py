"""Give each item to one of its permitted bins so that the fullest bin has as few as possible: an optimal semi-matching.

All layers are solved at once, each with its own limit. The limit starts at a lower bound. While a bin is over it,
one of its items moves along a shortest chain of moves towards a bin with room, as in the push-relabel method for
maximum flow (Goldberg and Tarjan, 1988). Where no chain leads to room, the bins that can be reached hold more than
the limit times their number, and items of theirs fit nowhere else: the limit was too low, and is raised by one. So
the result is optimal (semi-matchings: Harvey, Ladner, Lovász and Tamir, 2003).

Capped items, of which a bin has a limited number whatever room it has, are in a compartment of their bin. That is a
node of the network like a bin; what is in there counts for the bin too, but for what is over the cap.
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
    chosen = start.copy()
    shape, size = load.shape, load.size
    num_bins = shape[1]
    inner_load = np.zeros_like(load) if capped_load is None else capped_load
    node = layer * np.int64(num_bins)  # of an item's bin 0; compartments are behind all bins
    if capped is not None:
        node = node + size * capped
    place = node + bin_of[chosen]
    held = np.bincount(place, minlength=2 * size)
    held += np.concatenate([load, inner_load]).reshape(-1)
    most_capped = held[size:].reshape(shape).max(axis=1)
    cap = np.repeat(most_capped, num_bins)
    mean = -(-held.reshape(2, *shape).sum(axis=(0, 2)) // num_bins)
    limit = np.maximum.reduce([mean, (load + inner_load).max(axis=1), most_capped])
    items = np.arange(len(start))
    while True:
        inner = np.minimum(held[size:], cap)
        room = np.repeat(limit, num_bins) - held[:size] - inner
        over = np.concatenate([room < 0, held[size:] > cap])
        active = np.asarray(over.reshape(2, *shape).any(axis=(0, 2)))
        if not active.any():
            return chosen
        items = items[active[layer[items]]]
        item, option = _options(items, first, count)
        source, target = place[item], node[item] + bin_of[option]
        own = np.flatnonzero(np.repeat(active, num_bins))
        enters, leaves = own[(held[size:] < cap)[own]], own[inner[own] > 0]
        distance = _moves_to_room(source, target, room > 0, enters, leaves)
        limit += (over & (distance == _UNREACHABLE)).reshape(2, *shape).any(axis=(0, 2))
        over[size:] |= over[:size] & (distance[size:] == distance[:size])
        moves = np.flatnonzero(over[source] & (distance[target] + 1 == distance[source]))
        for ends in (source, target):
            moves = moves[np.unique(ends[moves] % size, return_index=True)[1]]
        chosen[item[moves]], place[item[moves]] = option[moves], target[moves]
        np.subtract.at(held, source[moves], 1)
        np.add.at(held, target[moves], 1)


def _options(
    items: npt.NDArray[np.intp], first: npt.NDArray[np.intp], count: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """List each item with each of its options: two of ``[options of all]``."""
    number = count[items]
    item = np.repeat(items, number)
    return item, np.repeat(first[items] - (np.cumsum(number) - number), number) + np.arange(len(item))


def _moves_to_room(source: Ints, to: Ints, room: Bools, enters: Ints, leaves: Ints) -> npt.NDArray[np.int64]:
    """Count the moves from each node to a bin with room: ``[bins and compartments]``.

    :param room: which bins have some
    :param enters: bins of which one more in the compartment is one more in the bin
    :param leaves: bins of which one less in the compartment is one less in the bin
    """
    distance = np.full(2 * len(room), _UNREACHABLE)
    bins, inner = distance[: len(room)], distance[len(room) :]
    bins[room] = 0
    reached = -1
    while True:
        inner[enters] = np.minimum(inner[enters], bins[enters])
        bins[leaves] = np.minimum(inner[leaves], bins[leaves])
        if (now := int((distance < _UNREACHABLE).sum())) == reached:
            return distance
        reached = now
        np.minimum.at(distance, source, np.minimum(distance[to] + 1, _UNREACHABLE))
