"""Staged buffers to live weights, then publish: no other code of an update writes what the model reads.

Besides, recovery writes experts that no remaining rank has and that it loads from elsewhere, while nobody serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.commit.table import committed_slots
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.scratch import aligned
from async_eplb.staging import BufferState, StagingBuffer
from async_eplb.weights import ExpertWeights

_DTYPES = (torch.int32, torch.uint8)
"""As which slots are copied."""


class PreparedCommit(Protocol):
    """The commit of one layer, for which everything but enqueuing the copies has been done."""

    def run(self) -> int:
        """Enqueue the copies of all staged slots to live weights, and publishing, on the current stream.

        Called once, after the layer is staged on every rank.

        :returns: bytes that are written to live weights
        :raises EplbError: if the buffer is not STAGED; nothing is written then
        """
        ...


class Committer(Protocol):
    """How the layers of one updater are committed; chosen once."""

    def scratch_nbytes(self, row: int) -> int:
        """Return the most bytes of scratch that :meth:`prepare` takes for a layer, whatever its plan and addresses."""
        ...

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> PreparedCommit:
        """Copy this rank's own slots to staging, and do what else can be done before the layer is staged.

        All of it is enqueued on the current stream; the layer may be called staged once this stream has done it.

        :param buffer: laid out for the plan
        """
        ...


Copy = tuple[Tensor, Tensor]
"""A live slot of a tensor, and what is staged for it: ``[elements]`` both, of the same dtype."""


@dataclass(frozen=True, slots=True)
class CopyCommit:
    """A commit as copies of lists of tensors.

    :param maps: in scratch memory
    """

    row: int
    copies: Sequence[Copy]
    buffer: StagingBuffer
    expert_map: ExpertMap
    maps: Sequence[Tensor]

    @torch.no_grad()
    def run(self) -> int:
        """Enqueue one copy for each dtype, then publish."""
        self.buffer.enter(BufferState.COMMITTING)
        for dtype in _DTYPES:
            alike = [copy for copy in self.copies if copy[0].dtype is dtype]
            if alike:
                torch._foreach_copy_([live for live, _ in alike], [staged for _, staged in alike])
        self.expert_map.publish(self.row, self.maps)  # rule 2: on the stream of the copies, right after them
        return sum(live.nbytes for live, _ in self.copies)


class CopyCommitter:
    """Commits with torch's copies of lists of tensors, which every device can do.

    The constructor makes one such copy of each kind, so that no commit waits for kernels to be loaded.
    """

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._weights = weights
        self._expert_map = expert_map
        for dtype in _DTYPES:
            one, other = torch.zeros((2, 1), dtype=dtype, device=weights.device)
            torch._foreach_copy_([one], [other])

    def scratch_nbytes(self, row: int) -> int:
        """Return the bytes of a layer's map rows."""
        return sum(aligned(each.nbytes) for each in self._expert_map.published(row))

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> CopyCommit:
        """Copy own slots to staging and map rows to scratch, and list the copies of the commit."""
        for own in plan.local_copies:
            live = self._weights.slot_views(row, own.src_slot)
            for view, staged in zip(live, buffer.views(own.dst_slot), strict=True):
                staged.copy_(view)
        copies = [
            _in_words(view, staged)
            for staged_slot, live_slot in committed_slots(plan)
            for view, staged in zip(self._weights.slot_views(row, live_slot), buffer.views(staged_slot), strict=True)
        ]
        rows = buffer.scratch.upload(*self._expert_map.rows(maps))
        return CopyCommit(row, copies, buffer, self._expert_map, rows)


def committer_for(weights: ExpertWeights, expert_map: ExpertMap) -> Committer:
    """Return the fastest committer for the device of the weights: one with Triton on CUDA, if it is installed."""
    if weights.device.type == "cuda" and find_spec("triton") is not None:
        from async_eplb.commit.fused import FusedCommitter  # noqa: PLC0415 - needs Triton

        return FusedCommitter(weights, expert_map)
    return CopyCommitter(weights, expert_map)


def _in_words(live: Tensor, staged: Tensor) -> Copy:
    """View both as int32 where that fits: lists of bytes are copied at half the speed."""
    places = (live.data_ptr(), live.storage_offset(), staged.data_ptr(), staged.storage_offset(), live.nbytes)
    if any(place % torch.int32.itemsize for place in places):
        return live, staged
    return live.view(torch.int32), staged.view(torch.int32)
