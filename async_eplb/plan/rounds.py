"""Cut transfers into rounds in which each rank talks with few peers: an edge colouring, by repeated matchings."""

import numpy as np
import numpy.typing as npt

from async_eplb.plan.transfers import Bools, Ints, Transfers


def in_rounds(transfers: Transfers, max_peers: int, num_ranks: int) -> Transfers:
    """Reorder transfers so that in each stage a rank sends to and receives from at most ``max_peers`` ranks.

    In every round, pairs of ranks are matched greedily, those of the ranks with most peers left first, until none
    fits any more; so there are fewer than twice as many rounds as the busiest rank has peers, and seldom more than
    one beyond that number. ``max_peers`` rounds make a stage.
    """
    stage = _dense(transfers.layer * (1 + np.int64(transfers.stage.max(initial=0))) + transfers.stage)
    pair_key = (stage * num_ranks + transfers.src_rank) * num_ranks + transfers.dst_rank
    pairs, pair_of = np.unique(pair_key, return_inverse=True)
    src = pairs // num_ranks
    dst = src // num_ranks * num_ranks + pairs % num_ranks
    rounds = _colour(src, dst)[pair_of] // max_peers
    order = np.lexsort((rounds, stage))
    ordered = transfers.take(order)
    ordered.stage[:] = (transfers.stage * np.int64(1 + rounds.max(initial=0)) + rounds)[order]
    return ordered


def _colour(src: Ints, dst: Ints) -> npt.NDArray[np.int64]:
    """Number pairs so that none of one number share a source or a destination: ``[pairs]``."""
    colour = np.zeros(len(src), dtype=np.int64)
    left = np.arange(len(src))
    number = 0
    while len(left):
        peers = np.maximum(np.bincount(src[left])[src[left]], np.bincount(dst[left])[dst[left]])
        left = left[np.argsort(-peers, kind="stable")]
        matched = _maximal_matching(src[left], dst[left])
        colour[left[matched]] = number
        left = left[~matched]
        number += 1
    return colour


def _maximal_matching(src: Ints, dst: Ints) -> Bools:
    """Choose pairs that share no end, the earlier ones first, until no other fits: ``[pairs]``."""
    matched = np.zeros(len(src), dtype=np.bool_)
    taken_src, taken_dst = (np.zeros(int(ends.max()) + 1, dtype=np.bool_) for ends in (src, dst))
    free = np.arange(len(src))
    while len(free):
        first_src, first_dst = (np.unique(ends[free], return_index=True)[1] for ends in (src, dst))
        chosen = free[np.intersect1d(first_src, first_dst, assume_unique=True)]
        matched[chosen] = True
        taken_src[src[chosen]] = taken_dst[dst[chosen]] = True
        free = free[~(taken_src[src[free]] | taken_dst[dst[free]])]
    return matched


def _dense(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number ascending keys from 0 without gaps."""
    steps = np.zeros(len(keys), dtype=np.int64)
    steps[1:] = keys[1:] != keys[:-1]
    return np.cumsum(steps)
