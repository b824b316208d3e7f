"""How much staging an updater reserves, and which updates fit it: the same answers on every rank."""

import numpy as np

from async_eplb.commit.committer import Committer
from async_eplb.errors import InvalidOptions, StagingTooSmall
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import staged_slot_counts
from async_eplb.scratch import ALIGNMENT
from async_eplb.staging import BufferSize, StagingPool
from async_eplb.topology import EPTopology
from async_eplb.update.rank import Rank
from async_eplb.verify.column import Verifier
from async_eplb.weights import ExpertWeights


def buffer_size(committer: Committer, verifier: Verifier, options: UpdateOptions) -> BufferSize:
    """Return the size of a staging buffer: what the options say, or else all slots of the largest layer.

    :raises InvalidOptions: if a buffer would not hold one slot of each layer
    """
    weights = verifier.weights
    one_slot = {row: _slot_nbytes(weights, row) for row in weights.rows}
    largest = max(one_slot, key=lambda row: one_slot[row])
    nbytes = weights.num_local_physical_experts * one_slot[largest]
    if options.reserve_nbytes is not None:
        nbytes = options.reserve_nbytes // options.staging_depth // ALIGNMENT * ALIGNMENT
    if nbytes < one_slot[largest]:
        raise InvalidOptions(
            f"reserve_nbytes is {options.reserve_nbytes}, of which each of {options.staging_depth} staging buffers "
            f"gets {nbytes}; one slot of layer {largest} takes {one_slot[largest]}",
            option="reserve_nbytes",
        )
    scratch_nbytes = max(committer.scratch_nbytes(row) + verifier.scratch_nbytes(row) for row in weights.rows)
    return BufferSize(nbytes, scratch_nbytes)


def allocate(pool: StagingPool, rank: Rank) -> None:
    """Allocate what updates need, and load their kernels: later both can wait for whatever the device is at. Blocks."""
    try:
        pool.allocate()
    except Exception as error:
        error.add_note(f"staging takes {pool.nbytes} bytes; UpdateOptions.reserve_nbytes sets another size")
        raise
    with rank.device.committing():
        rank.verifier.warm_up(pool.buffers[0].scratch)


def require_staging(
    old: ExpertPlacement,
    new: ExpertPlacement,
    rows: tuple[int, ...],
    *,
    weights: ExpertWeights,
    topology: EPTopology,
    size: BufferSize,
) -> None:
    """Check that what each rank stages of each layer fits a buffer. All ranks have the same answer.

    :param rows: layers that change
    :param size: of a buffer
    :raises StagingTooSmall: for the first layer that does not fit, and the rank that stages most of it
    """
    fits = [size.slots_nbytes // _slot_nbytes(weights, row) for row in rows]  # [rows], in slots
    if all(number >= topology.num_local_physical_experts for number in fits):
        return
    before, after = (each.physical_to_logical_map[list(rows)] for each in (old, new))  # [rows, physical]
    counts = staged_slot_counts(before, after, topology)  # [rows, ranks]
    over = np.flatnonzero(counts.max(axis=1) > fits)
    if len(over):
        place = int(over[0])
        row, rank = rows[place], int(counts[place].argmax())
        needed = int(counts[place, rank]) * _slot_nbytes(weights, row)
        raise StagingTooSmall(
            f"layer {row}: rank {rank} would stage {counts[place, rank]} slots, {needed} bytes, and a staging buffer "
            f"holds {size.slots_nbytes}; raise UpdateOptions.reserve_nbytes, or move fewer slots of a layer",
            layer=row,
            rank=rank,
            needed_nbytes=needed,
            reserved_nbytes=size.slots_nbytes,
        )


def _slot_nbytes(weights: ExpertWeights, row: int) -> int:
    return StagingPool.layer_nbytes(1, weights.slot_nbytes(row))
