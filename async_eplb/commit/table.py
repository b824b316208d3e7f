"""A layer's commit, and its own slots' way to staging, as tables of equal chunks: one kernel launch does all of one.

The table is made while the layer is being staged and waits beside the layer's slots in its staging buffer, together
with the layer's new map rows. So committing needs nothing from the host but the launch.
"""

from collections.abc import Callable, Sequence
from functools import partial
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
"""Bytes of a chunk that is copied in vectors, or a multiple of this."""
MOST_CHUNKS = 8192
"""Of those that are copied in vectors, beside the last of each segment: a GPU has room for some hundred at a time."""
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


def most_chunks(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many entries :func:`chunk_table` makes of each segment at most, beside whatever others."""
    vectors, single = _pieces(segments)
    return _counts(single, BYTEWISE_CHUNK_NBYTES) + _counts(vectors, CHUNK_NBYTES)


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

    def write(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> tuple[Tensor, Tensor]:
        """Put a layer's tables and map rows beside its staged slots, on the current stream.

        :param buffer: laid out, with :meth:`nbytes` to spare
        :returns: the tables of what fills staging from this rank's own slots, and of the commit: int64
            ``[chunks, 3]``, on the device
        """
        spare, rows = buffer.spare, maps.tensors
        *starts, tables_start = accumulate((_aligned(new.nbytes) for new in rows), initial=0)
        own = [(copy.src_slot, copy.dst_slot) for copy in plan.local_copies]
        to_staging = chunk_table(self._segments(row, own, self._weights_at(row), buffer.addresses))
        published = self._expert_map.published(row).tensors
        maps_to_live = [
            (spare.data_ptr() + start, place.data_ptr(), place.nbytes)
            for start, place in zip(starts, published, strict=True)
        ]
        slots_to_live = self._segments(row, committed_slots(plan), buffer.addresses, self._weights_at(row))
        counter = increment(self._expert_map.layer_generation[row].data_ptr())
        segments = np.concatenate([slots_to_live, np.array(maps_to_live, dtype=np.int64)])
        to_live = np.concatenate([counter, chunk_table(segments)])
        second_start = tables_start + _aligned(to_staging.nbytes)
        packed = torch.empty(second_start + to_live.nbytes, dtype=torch.uint8, pin_memory=spare.is_cuda)
        content = packed.numpy()
        for start, new in zip(starts, rows, strict=True):
            content[start : start + new.nbytes] = new.numpy().reshape(-1).view(np.uint8)
        for start, table in ((tables_start, to_staging), (second_start, to_live)):
            content[start : start + table.nbytes] = table.reshape(-1).view(np.uint8)
        # The pinned memory is reused only after this copy, which torch's allocator of pinned memory sees to.
        spare[: packed.nbytes].copy_(packed, non_blocking=True)
        first, second = (
            spare[start : start + table.nbytes].view(torch.int64).view(-1, _COLUMNS)
            for start, table in ((tables_start, to_staging), (second_start, to_live))
        )
        return first, second

    def _weights_at(self, row: int) -> Callable[[Sequence[int]], npt.NDArray[np.int64]]:
        return partial(self._weights.addresses, row)

    def _segments(
        self,
        row: int,
        pairs: Sequence[tuple[int, int]],
        sources: Callable[[Sequence[int]], npt.NDArray[np.int64]],
        destinations: Callable[[Sequence[int]], npt.NDArray[np.int64]],
    ) -> npt.NDArray[np.int64]:
        """Return all tensors of some slots as segments.

        :param pairs: slot that is read and slot that is written
        :param sources: returns the addresses of slots that are read, ``[slots, tensors]``
        """
        src, dst = (sources([src for src, _ in pairs]), destinations([dst for _, dst in pairs]))
        nbytes = np.broadcast_to(np.array(self._weights.slot_nbytes(row), dtype=np.int64), src.shape)
        return np.stack([src, dst, nbytes], axis=-1).reshape(-1, _COLUMNS)

    def _largest_nbytes(self, row: int) -> int:
        """Return the size for a plan that writes all slots, from any slots; staging is aligned."""
        maps = self._expert_map.published(row).tensors
        maps_to_live = [(0, published.data_ptr(), published.nbytes) for published in maps]
        num_slots = self._weights.num_local_physical_experts
        live = self._weights.addresses(row, range(num_slots))
        nbytes = np.broadcast_to(np.array(self._weights.slot_nbytes(row)), live.shape)
        each = most_chunks(np.stack([live, np.zeros_like(live), nbytes], axis=-1)).reshape(live.shape)
        to_staging = num_slots * each.max(axis=0).sum()
        entries = 1 + int(to_staging + each.sum() + most_chunks(np.array(maps_to_live, dtype=np.int64)).sum())
        return sum(_aligned(published.nbytes) for published in maps) + entries * _ENTRY_NBYTES + VECTOR_NBYTES


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
