"""Cut transfers into bounded groups that are posted together, the same on both sides; count the busiest rank's."""

import numpy as np
from einops import reduce

from async_eplb.plan.transfers import Bools, Ints, Transfers


def matching_groups(transfers: Transfers, limits: Ints, num_ranks: int) -> Ints:
    """Number the group of its layer that each transfer is posted in, ascending from 0: ``[transfers]``.

    Groups follow the order of the transfers. A new one begins with what is relayed, and where a rank would take part in
    more transfers of a group than the limit. Both sides of a transfer number it from the same columns, so they agree.

    :param limits: transfers that a rank may take part in within a group, ``[layers]``
    """
    if not len(transfers.layer):
        return transfers.layer
    new_hop = _begins(transfers.layer, transfers.relayed)  # [transfers]
    run = np.cumsum(_cut(new_hop, transfers, limits, num_ranks)) - 1  # [transfers], over all layers
    starts = np.flatnonzero(_begins(transfers.layer))  # [layers that move]
    first_run = np.repeat(run[starts], np.diff(starts, append=len(run)))  # [transfers]
    return np.asarray(run - first_run)


def busiest_ends(transfers: Transfers, num_layers: int, num_ranks: int) -> tuple[Ints, Ints]:
    """Count what the rank that sends most, and the one that receives most, have of each layer: two of ``[layers]``."""
    sent, received = (
        reduce(
            np.bincount(transfers.layer * np.int64(num_ranks) + ranks, minlength=num_layers * num_ranks),
            "(layers ranks) -> layers",
            "max",
            ranks=num_ranks,
        )
        for ranks in (transfers.src_rank, transfers.dst_rank)
    )
    return sent, received


def _begins(*columns: Ints | Bools) -> Bools:
    """Return where any of the columns changes; the first entry counts."""
    begins = np.ones(len(columns[0]), dtype=np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _cut(new_hop: Bools, transfers: Transfers, limits: Ints, num_ranks: int) -> Bools:
    """Return where groups begin: ``[transfers]``.

    A *segment* is one hop of one layer. Every pass finds the first transfer of each segment that is too many for its
    group, and begins a group there; so there are as many passes as the segment with most groups has.
    """
    limit = limits[transfers.layer]  # [transfers]
    segment = np.cumsum(new_hop) - 1  # [transfers]
    ends = np.stack([transfers.src_rank, transfers.dst_rank], axis=1)  # [transfers, 2]
    keys = segment[:, None] * np.int64(num_ranks) + ends  # [transfers, 2]: one number for segment and rank
    if (np.bincount(keys.reshape(-1))[keys] <= limit[:, None]).all():
        return new_hop  # mostly: no rank has more in a whole segment
    ordinal = _ordinals(keys.reshape(-1)).reshape(-1, 2)  # [transfers, 2]
    begins, index = new_hop.copy(), np.arange(len(segment))  # [transfers]
    cut_at = np.flatnonzero(new_hop)  # [segments]: where the last group of each begins
    done = np.zeros_like(keys)  # [transfers, 2]: what each end has in earlier groups of its segment
    while True:
        over = np.flatnonzero(((ordinal - done) > limit[:, None]).any(axis=1))
        if not len(over):
            return begins
        first = over[_begins(segment[over])]  # of each segment
        begins[first] = True
        cut_at[segment[first]] = first
        earlier = keys[index < cut_at[segment]].reshape(-1)
        done = np.bincount(earlier, minlength=int(keys.max()) + 1)[keys]


def _ordinals(keys: Ints) -> Ints:
    """Count, for each key, its occurrences so far, itself among them."""
    order = np.argsort(keys, kind="stable")  # [keys]: equal ones side by side, in their order
    starts = np.flatnonzero(_begins(keys[order]))  # [different keys]
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(1, len(keys) + 1) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return counts
