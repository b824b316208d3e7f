"""What a layer's commit copies, as a table of equal chunks, all of which one kernel launch copies; own slots likewise.

The table is made while the layer is being staged and waits in the scratch memory of its staging buffer, together with
the layer's new map rows. So committing needs nothing from the host but the launch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.map_tables import runs
from async_eplb.plan import LayerPlan
from async_eplb.scratch import aligned
from async_eplb.staging import StagingBuffer
from async_eplb.weights import ExpertWeights

VECTOR_NBYTES = 16
CHUNK_NBYTES = 32768
"""Bytes of a chunk that is copied in vectors; in large layers a multiple of this."""
MOST_CHUNKS = 8192
"""Most chunks that are copied in vectors, not counting the last of each segment. A GPU runs some hundred at a time."""
BYTEWISE_CHUNK_NBYTES = 4096
"""Most bytes of a chunk that is copied byte by byte."""

_COLUMNS = 3
_ENTRY_NBYTES = _COLUMNS * 8


def chunk_table(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Cut segments into chunks: int64 ``[chunks, 3]`` of source address, destination address and amount.

    An amount above zero is a number of vectors of :data:`VECTOR_NBYTES`, to and from aligned addresses; below zero
    it is minus a number of single bytes. Every byte of every segment is in one chunk. Those of single bytes come
    first, because they take longest. The more bytes there are, the larger are the chunks.

    :param segments: ``[segments, 3]`` of source address, destination address and bytes
    """
    vectors, single = _pieces(segments)
    size = CHUNK_NBYTES * max(1, -(-int(vectors[:, 2].sum()) // (CHUNK_NBYTES * MOST_CHUNKS)))
    return np.concatenate([_cut(single, BYTEWISE_CHUNK_NBYTES, -1), _cut(vectors, size, VECTOR_NBYTES)])


def increment(address: int) -> npt.NDArray[np.int64]:
    """Return the entry that raises the int64 at ``address`` by one: an amount of zero."""
    return np.array([[0, address, 0]], dtype=np.int64)


def most_chunks(nbytes: int) -> int:
    """Return the most entries that :func:`chunk_table` makes of a segment, whatever its addresses and the others."""
    return -(-nbytes // BYTEWISE_CHUNK_NBYTES) + 1


def committed_slots(plan: LayerPlan) -> list[tuple[int, int]]:
    """List what a commit copies: (slot whose staging is read, live slot that is written)."""
    pairs = [(slot, slot) for slot in plan.staged_slots]
    return pairs + [(fan_out.staged_slot, fan_out.dst_slot) for fan_out in plan.fan_outs]


class CommitTables:
    """Makes the tables of one updater's layers.

    :param weights: live weights; their addresses stay (rule 7)
    :param expert_map: published maps; their addresses stay
    """

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._weights = weights
        self._expert_map = expert_map

    def nbytes(self, row: int) -> int:
        """Return the most bytes of scratch that a layer's tables and map rows take.

        That is for a plan that stages all slots, each from this rank, and commits all of them, wherever slots are: so
        it is equal on all ranks.
        """
        slots = self._weights.num_local_physical_experts
        own = slots * sum(map(most_chunks, self._weights.slot_nbytes(row)))
        published = self._expert_map.published(row)
        of_maps = sum(most_chunks(nbytes) for each in published for nbytes in runs(each)[:, 1].tolist())
        tables = (own * _ENTRY_NBYTES, (1 + own + of_maps) * _ENTRY_NBYTES)
        return sum(map(aligned, (*(each.nbytes for each in published), *tables)))

    def write(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> tuple[Tensor, Tensor]:
        """Put a layer's tables and map rows into its buffer's scratch memory, on the current stream.

        :param buffer: laid out
        :returns: two tables, int64 ``[chunks, 3]`` on the device: what copies this rank's own slots to staging, and
            what commits the layer
        """
        new_rows = buffer.scratch.upload(*self._expert_map.rows(maps))
        segments = np.concatenate([self._staged_slots(row, plan, buffer), self._map_rows(row, new_rows)])
        generation = increment(self._expert_map.layer_generation[row].data_ptr())
        to_live = np.concatenate([generation, chunk_table(segments)])
        to_staging, committing = buffer.scratch.upload(chunk_table(self._own_slots(row, plan, buffer)), to_live)
        return to_staging, committing

    def _own_slots(self, row: int, plan: LayerPlan, buffer: StagingBuffer) -> npt.NDArray[np.int64]:
        """Return the segments that go from live slots of this rank to staging: ``[slots * tensors, 3]``."""
        live = self._weights.addresses(row, [copy.src_slot for copy in plan.local_copies])
        staged = buffer.addresses([copy.dst_slot for copy in plan.local_copies])
        return _segments(live, staged, self._weights.slot_nbytes(row))

    def _staged_slots(self, row: int, plan: LayerPlan, buffer: StagingBuffer) -> npt.NDArray[np.int64]:
        """Return the segments that go from staging to live slots: ``[slots * tensors, 3]``."""
        pairs = committed_slots(plan)
        staged = buffer.addresses([staged_slot for staged_slot, _ in pairs])
        live = self._weights.addresses(row, [live_slot for _, live_slot in pairs])
        return _segments(staged, live, self._weights.slot_nbytes(row))

    def _map_rows(self, row: int, new_rows: Sequence[Tensor]) -> npt.NDArray[np.int64]:
        """Return the segments that go from a layer's new map rows to the published ones: ``[blocks, 3]``."""
        segments = [np.zeros((0, _COLUMNS), dtype=np.int64)]
        for new, published in zip(new_rows, self._expert_map.published(row), strict=True):
            blocks = runs(published)  # [blocks, 2]
            offsets = np.cumsum(blocks[:, 1]) - blocks[:, 1]  # [blocks]: a new row is one block
            segments.append(np.column_stack([new.data_ptr() + offsets, blocks]))
        return np.concatenate(segments)


def _segments(
    src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], slot_nbytes: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return all tensors of some slots as segments: ``[slots * tensors, 3]``.

    :param src: addresses that are read: ``[slots, tensors]``
    :param dst: addresses that are written: ``[slots, tensors]``
    :param slot_nbytes: bytes of a slot of each tensor: ``[tensors]``
    """
    nbytes = np.broadcast_to(np.array(slot_nbytes, dtype=np.int64), src.shape)  # [slots, tensors]
    return np.stack([src, dst, nbytes], axis=-1).reshape(-1, _COLUMNS)


def _pieces(segments: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split segments into what can be copied in vectors and the rest of each: ``[segments, 3]`` both."""
    src, dst, nbytes = segments.reshape(-1, _COLUMNS).T  # [segments] each
    fits = (src % VECTOR_NBYTES == 0) & (dst % VECTOR_NBYTES == 0)
    whole = np.where(fits, nbytes - nbytes % VECTOR_NBYTES, 0)
    return np.stack([src, dst, whole], axis=1), np.stack([src + whole, dst + whole, nbytes - whole], axis=1)


def _counts(pieces: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return the chunks of each piece: ``[pieces]``."""
    return -(-pieces[:, 2] // size)


def _cut(pieces: npt.NDArray[np.int64], size: int, unit: int) -> npt.NDArray[np.int64]:
    """Cut pieces into chunks of ``size`` bytes, the last of each shorter; amounts in units: ``[chunks, 3]``."""
    counts = _counts(pieces, size)  # [pieces]
    piece = np.repeat(np.arange(len(pieces)), counts)  # [chunks]: the piece that a chunk is of
    number = np.arange(len(piece)) - (np.cumsum(counts) - counts)[piece]  # [chunks]: its number in the piece
    src, dst, nbytes = pieces[piece].T  # [chunks] each
    offset = size * number
    return np.stack([src + offset, dst + offset, np.minimum(size, nbytes - offset) // unit], axis=1)
