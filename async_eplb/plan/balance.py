"""Give each item to one of its permitted bins so that the fullest bin has as few as possible: an optimal semi-matching.

All layers are solved at once, each with its own limit. The limit starts at a lower bound. While a bin is over it,
one of its items moves along a shortest chain of moves towards a bin with room, as in the push-relabel method for
maximum flow (Goldberg and Tarjan, 1988). Where no chain leads to room, the bins that can be reached hold more than
the limit times their number, and items of theirs fit nowhere else: the limit was too low, and is raised by one. So
the result is optimal (semi-matchings: Harvey, Ladner, Lovász and Tamir, 2003).
"""

import numpy as np
import numpy.typing as npt

from async_eplb.plan.transfers import Ints

_UNREACHABLE = np.iinfo(np.int32).max // 2


def balanced(
    start: npt.NDArray[np.intp],
    first: npt.NDArray[np.intp],
    count: npt.NDArray[np.intp],
    layer: Ints,
    bin_of: Ints,
    load: npt.NDArray[np.int64],
) -> npt.NDArray[np.intp]:
    """Choose an option for each item: ``[items]``. The same choice wherever it is computed.

    :param start: options to begin with; the better they are, the faster this is
    :param first: first of an item's options, which are consecutive; at least one
    :param count: how many it has
    :param layer: layer of each item
    :param bin_of: bin of each option, ``[options]``
    :param load: what each bin holds without these items, ``[layers, bins]``
    """
    chosen = start.copy()
    num_layers, num_bins = load.shape
    offset = layer * np.int64(num_bins)
    load = load.reshape(-1) + np.bincount(offset + bin_of[chosen], minlength=load.size)
    limit = -(-load.reshape(num_layers, num_bins).sum(axis=1) // num_bins)
    free = np.flatnonzero(count > 1)
    item = np.repeat(free, count[free])
    starts = np.cumsum(count[free]) - count[free]
    option = np.repeat(first[free] - starts, count[free]) + np.arange(len(item))
    target = offset[item] + bin_of[option]
    while True:
        excess = load > np.repeat(limit, num_bins)
        layers = np.flatnonzero(excess.reshape(num_layers, num_bins).any(axis=1))
        if not len(layers):
            return chosen
        active = np.zeros(num_layers, dtype=np.bool_)
        active[layers] = True
        edges = np.flatnonzero(active[target // num_bins])
        source, to = (offset + bin_of[chosen])[item[edges]], target[edges]
        distance = _moves_to_room(source, to, load < np.repeat(limit, num_bins))
        stuck = (excess & (distance == _UNREACHABLE)).reshape(num_layers, num_bins).any(axis=1)
        limit[stuck] += 1
        moves = np.flatnonzero(excess[source] & (distance[to] + 1 == distance[source]))
        for ends in (source, to):
            moves = moves[np.unique(ends[moves], return_index=True)[1]]
        chosen[item[edges[moves]]] = option[edges[moves]]
        np.subtract.at(load, source[moves], 1)
        np.add.at(load, to[moves], 1)


def _moves_to_room(source: Ints, to: Ints, room: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Count the moves from each bin to one with room: ``[bins]``."""
    distance = np.where(room, 0, _UNREACHABLE)
    reached = -1
    while (now := int((distance < _UNREACHABLE).sum())) > reached:
        reached = now
        np.minimum.at(distance, source, np.minimum(distance[to] + 1, _UNREACHABLE))
    return distance
