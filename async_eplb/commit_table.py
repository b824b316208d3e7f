"""A layer's commit as a table of equal chunks, so that one kernel launch can do all of it.

The table is made while the layer is being staged and waits beside the layer's slots in its staging buffer, together
with the layer's new map rows. So committing needs nothing from the host but the launch.
"""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.staging import StagingBuffer
from async_eplb.weights import ExpertWeights

VECTOR_NBYTES = 16
CHUNK_NBYTES = 32768
"""Most bytes of a chunk that is copied in vectors."""
BYTEWISE_CHUNK_NBYTES = 4096
"""Most bytes of a chunk that is copied byte by byte."""

_COLUMNS = 3
_ENTRY_NBYTES = _COLUMNS * 8

Segment = tuple[int, int, int]
"""Address of the source, address of the destination, bytes."""


def chunk_table(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Cut segments into chunks: int64 ``[chunks, 3]`` of source address, destination address and amount.

    An amount above zero is a number of vectors of :data:`VECTOR_NBYTES`, to and from aligned addresses; below zero
    it is minus a number of single bytes. Every byte of every segment is in one chunk. Those of single bytes come
    first, because they take longest.

    :param segments: ``[segments, 3]`` of source address, destination address and bytes
    """
    vectors, single = _pieces(segments)
    return np.concatenate([_cut(single, BYTEWISE_CHUNK_NBYTES, -1), _cut(vectors, CHUNK_NBYTES, VECTOR_NBYTES)])


def increment(address: int) -> npt.NDArray[np.int64]:
    """Return the entry that raises the int64 at ``address`` by one: an amount of zero."""
    return np.array([[0, address, 0]], dtype=np.int64)


def num_chunks(segments: npt.NDArray[np.int64]) -> int:
    """Return how many entries :func:`chunk_table` makes of segments."""
    vectors, single = _pieces(segments)
    return int(_counts(single, BYTEWISE_CHUNK_NBYTES).sum() + _counts(vectors, CHUNK_NBYTES).sum())


def committed_slots(plan: LayerPlan) -> list[tuple[int, int]]:
    """Return what a commit copies: (slot whose staging is read, live slot that is written)."""
    pairs = [(slot, slot) for slot in plan.staged_slots]
    return pairs + [(fan_out.staged_slot, fan_out.dst_slot) for fan_out in plan.fan_outs]


class CommitTables:
    """Makes the tables of one updater's layers.

    :param weights: live weights; their addresses stay
    :param expert_map: published maps; their addresses stay
    """

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._weights = weights
        self._expert_map = expert_map
        self._nbytes = {row: self._largest_nbytes(row) for row in weights.rows}

    def nbytes(self, row: int) -> int:
        """Return what a layer's table and map rows take in staging at most, whatever its plan."""
        return self._nbytes[row]

    def write(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> Tensor:
        """Put a layer's table and map rows beside its staged slots, on the current stream.

        :param buffer: laid out, with :meth:`nbytes` to spare
        :returns: the table, int64 ``[chunks, 3]``, on the device
        """
        spare, rows = buffer.spare, maps.tensors
        *starts, table_start = accumulate((_aligned(new.nbytes) for new in rows), initial=0)
        segments = [*self._slot_segments(row, plan, buffer)]
        for start, new, published in zip(starts, rows, self._expert_map.published(row).tensors, strict=True):
            segments.append((spare.data_ptr() + start, published.data_ptr(), new.nbytes))
        counter = increment(self._expert_map.layer_generation[row].data_ptr())
        table = np.concatenate([counter, chunk_table(np.array(segments, dtype=np.int64))])
        packed = torch.empty(table_start + table.nbytes, dtype=torch.uint8, pin_memory=spare.is_cuda)
        content = packed.numpy()
        for start, new in zip(starts, rows, strict=True):
            content[start : start + new.nbytes] = new.numpy().reshape(-1).view(np.uint8)
        content[table_start:] = table.reshape(-1).view(np.uint8)
        # The pinned memory is reused only after this copy, which torch's allocator of pinned memory sees to.
        spare[: packed.nbytes].copy_(packed, non_blocking=True)
        return spare[table_start : packed.nbytes].view(torch.int64).view(-1, _COLUMNS)

    def _slot_segments(self, row: int, plan: LayerPlan, buffer: StagingBuffer) -> Iterator[Segment]:
        for staged_slot, live_slot in committed_slots(plan):
            for view, staged in zip(self._weights.views(row), buffer.views(staged_slot), strict=True):
                yield staged.data_ptr(), view.data_ptr() + live_slot * view.stride(0), staged.nbytes

    def _largest_nbytes(self, row: int) -> int:
        """Return the size for a plan that writes all slots; staging is aligned, so source addresses do not matter."""
        maps = self._expert_map.published(row).tensors
        segments = [(0, published.data_ptr(), published.nbytes) for published in maps]
        segments += [
            (0, view.data_ptr() + slot * view.stride(0), view.shape[1])
            for view in self._weights.views(row)
            for slot in range(view.shape[0])
        ]
        entries = 1 + num_chunks(np.array(segments, dtype=np.int64))
        return sum(_aligned(published.nbytes) for published in maps) + entries * _ENTRY_NBYTES


def _pieces(segments: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split segments into what can be copied in vectors and what is left over."""
    src, dst, nbytes = segments.reshape(-1, _COLUMNS).T
    fits = (src % VECTOR_NBYTES == 0) & (dst % VECTOR_NBYTES == 0)
    whole = np.where(fits, nbytes - nbytes % VECTOR_NBYTES, 0)
    return np.stack([src, dst, whole], axis=1), np.stack([src + whole, dst + whole, nbytes - whole], axis=1)


def _counts(pieces: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    return -(-pieces[:, 2] // size)


def _cut(pieces: npt.NDArray[np.int64], size: int, unit: int) -> npt.NDArray[np.int64]:
    """Cut pieces into chunks of ``size`` bytes, the last of each shorter; amounts in units."""
    counts = _counts(pieces, size)
    ends = np.cumsum(counts)
    offset = size * np.arange(ends[-1] if len(ends) else 0)
    first = size * (ends - counts)  # offset at which a piece begins
    src, dst, left = (np.repeat(column, counts) for column in (pieces + first[:, None] * [-1, -1, 1]).T)
    return np.stack([src + offset, dst + offset, np.minimum(size, left - offset) // unit], axis=1)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // VECTOR_NBYTES) * VECTOR_NBYTES
