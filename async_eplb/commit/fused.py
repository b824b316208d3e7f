"""On CUDA: one kernel launch commits a layer, and one copies this rank's own slots to staging.

Needs Triton; imported only where there are both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from async_eplb.commit.table import (
    BYTEWISE_CHUNK_NBYTES,
    CHUNK_NBYTES,
    VECTOR_NBYTES,
    CommitTables,
    committed_slots,
    increment,
)
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.staging import BufferState, StagingBuffer
from async_eplb.weights import ExpertWeights

_VECTOR_WORDS = tl.constexpr(VECTOR_NBYTES // 8)
_CHUNK_WORDS = tl.constexpr(CHUNK_NBYTES // 8)
_CHUNK_BYTES = tl.constexpr(BYTEWISE_CHUNK_NBYTES)
_NUM_WARPS = 32


@triton.jit
def _commit_chunk(table):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Copy one chunk, or raise a counter: one program for each entry of a table int64 ``[chunks, 3]``."""
    entry = table + 3 * tl.program_id(0)
    src = tl.load(entry)
    dst = tl.load(entry + 1)
    amount = tl.load(entry + 2).to(tl.int32)
    if amount > 0:
        # The hints make loads and stores 16 bytes wide.
        num_words = tl.multiple_of(_VECTOR_WORDS * amount, _VECTOR_WORDS)
        source = tl.multiple_of(src.to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(dst.to(tl.pointer_type(tl.int64)), 16)
        for start in range(0, num_words, _CHUNK_WORDS):
            words = start + tl.arange(0, _CHUNK_WORDS)
            inside = words < num_words
            tl.store(target + words, tl.load(source + words, mask=inside), mask=inside)
    elif amount < 0:
        offsets = tl.arange(0, _CHUNK_BYTES)
        inside = offsets < -amount
        source = src.to(tl.pointer_type(tl.int8)) + offsets
        target = dst.to(tl.pointer_type(tl.int8)) + offsets
        tl.store(target, tl.load(source, mask=inside), mask=inside)
    else:
        counter = dst.to(tl.pointer_type(tl.int64))
        tl.store(counter, tl.load(counter) + 1)


@dataclass(frozen=True, slots=True)
class FusedCommit:
    """A commit as one kernel launch.

    :param launch: launches the kernel with as many programs as the table has chunks
    :param table: int64 ``[chunks, 3]``, on the device
    :param nbytes: bytes that it writes to live weights
    :param on_device: makes the device of the weights the current one; made before, for the serving thread enters it
    """

    launch: Callable[[Tensor], object]
    table: Tensor
    buffer: StagingBuffer
    nbytes: int
    on_device: torch.cuda.device

    def run(self) -> int:
        """Launch the kernel, which also publishes."""
        self.buffer.enter(BufferState.COMMITTING)
        with self.on_device:
            self.launch(self.table)
        return self.nbytes


class FusedCommitter:
    """Copies all slots and tensors of a layer and publishes its maps in one launch.

    The constructor launches the kernel once, on a counter of its own: this compiles it, or loads it from Triton's
    cache, so that no commit waits for that (rule 3).
    """

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._tables = CommitTables(weights, expert_map)
        self._weights = weights
        self._device = weights.device
        counter = torch.zeros((), dtype=torch.int64, device=self._device)
        table = torch.from_numpy(increment(counter.data_ptr())).to(self._device)
        with torch.cuda.device(self._device):
            # What this returns is launched in half the time: there is no argument left to specialise for.
            self._kernel = _commit_chunk[(1,)](table, num_warps=_NUM_WARPS)

    def scratch_nbytes(self, row: int) -> int:
        """Return the bytes of a layer's tables and map rows."""
        return self._tables.nbytes(row)

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> FusedCommit:
        """Upload the layer's tables and copy own slots to staging, on the current stream."""
        own, table = self._tables.write(row, plan, buffer, maps)
        on_device = torch.cuda.device(self._device)
        if len(own):
            with on_device:
                self._kernel[(len(own), 1, 1)](own)
        nbytes = len(committed_slots(plan)) * sum(self._weights.slot_nbytes(row))
        return FusedCommit(self._kernel[(len(table), 1, 1)], table, buffer, nbytes, on_device)
