"""Which transfers are posted together: bounded groups that match on both sides, and what the busiest rank does."""

import numpy as np

from async_eplb.plan.transfers import Bools, Ints, Transfers


def matching_groups(transfers: Transfers, limits: Ints, num_ranks: int) -> Ints:
    """Number the group of its layer that each transfer is posted in, ascending from 0: ``[transfers]``.

    Groups follow the order of the transfers. A new one begins with each stage, and where a rank would take part in
    more transfers of a group than the limit. Both sides of a transfer number it from the same columns, so they agree.

    :param limits: transfers that a rank may take part in within a group, ``[layers]``
    """
    if not len(transfers.layer):
        return transfers.layer
    new_stage = _begins(transfers.layer, transfers.stage)
    run = np.cumsum(_cut(new_stage, transfers, limits, num_ranks)) - 1
    starts = np.flatnonzero(_begins(transfers.layer))
    return np.asarray(run - np.repeat(run[starts], np.diff(starts, append=len(run))))


def busiest_ends(transfers: Transfers, num_layers: int, num_ranks: int) -> tuple[Ints, Ints]:
    """Count what the rank that sends most, and the one that receives most, have of each layer: two of ``[layers]``."""
    sent, received = (
        np.bincount(transfers.layer * np.int64(num_ranks) + ranks, minlength=num_layers * num_ranks)
        .reshape(num_layers, num_ranks)
        .max(axis=1)
        for ranks in (transfers.src_rank, transfers.dst_rank)
    )
    return sent, received


def _begins(*columns: Ints) -> Bools:
    """Return where any of the columns changes; the first entry counts."""
    begins = np.ones(len(columns[0]), dtype=np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _cut(new_stage: Bools, transfers: Transfers, limits: Ints, num_ranks: int) -> Bools:
    """Return where groups begin. One pass cuts every stage of every layer once more."""
    limit = limits[transfers.layer]
    segment = np.cumsum(new_stage) - 1
    ends = np.stack([transfers.src_rank, transfers.dst_rank], axis=1)
    keys = segment[:, None] * np.int64(num_ranks) + ends
    if (np.bincount(keys.reshape(-1))[keys] <= limit[:, None]).all():
        return new_stage
    ordinal = _ordinals(keys.reshape(-1)).reshape(-1, 2)
    begins, index = new_stage.copy(), np.arange(len(segment))
    cut_at = np.flatnonzero(new_stage)  # where the last group of each segment begins
    done = np.zeros_like(keys)
    while True:
        over = np.flatnonzero(((ordinal - done) > limit[:, None]).any(axis=1))
        if not len(over):
            return begins
        first = over[_begins(segment[over])]
        begins[first] = True
        cut_at[segment[first]] = first
        earlier = keys[index < cut_at[segment]].reshape(-1)
        done = np.bincount(earlier, minlength=int(keys.max()) + 1)[keys]


def _ordinals(keys: Ints) -> Ints:
    """Count, for each key, its occurrences so far, itself among them."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(_begins(keys[order]))
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(1, len(keys) + 1) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return counts
