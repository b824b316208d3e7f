"""Staged buffers → live weights, then publish: the only code that writes what the model reads."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.commit.table import committed_slots
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.staging import BufferState, StagingBuffer
from async_eplb.weights import ExpertWeights


class Committer(Protocol):
    """How the layers of one updater are committed; chosen once."""

    def spare_nbytes(self, row: int) -> int:
        """Return the staging that committing a layer needs beside its slots."""
        ...

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> Callable[[], int]:
        """Copy this rank's own slots to staging, and do what else can be done before the layer is staged.

        All on the current stream, behind which the layer is staged.

        :param buffer: laid out for the plan, with :meth:`spare_nbytes` to spare
        :returns: the commit. Called once, when the layer is staged on every rank, it enqueues all of it on the
            current stream and returns the bytes that are written to live weights; it raises EplbError if the
            buffer is not STAGED
        """
        ...


Copy = tuple[Tensor, Tensor]
"""A live slot of a tensor, and what is staged for it; of the same dtype."""


class CopyCommitter:
    """Commits with torch's copies of lists of tensors, which every device can do."""

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._weights = weights
        self._expert_map = expert_map

    def spare_nbytes(self, row: int) -> int:  # noqa: ARG002 - the protocol's
        """Return 0."""
        return 0

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> Callable[[], int]:
        """Copy own slots; return the copies of the commit."""
        live = self._weights.views(row)
        for own in plan.local_copies:
            for view, staged in zip(live, buffer.views(own.dst_slot), strict=True):
                staged.copy_(view[own.src_slot])
        copies = [
            _in_words(view[live_slot], staged)
            for staged_slot, live_slot in committed_slots(plan)
            for view, staged in zip(live, buffer.views(staged_slot), strict=True)
        ]
        return partial(commit_layer, row, copies, buffer, self._expert_map, maps)


def committer_for(weights: ExpertWeights, expert_map: ExpertMap) -> Committer:
    """Return the fastest committer there is for the device of the weights."""
    if weights.device.type == "cuda" and find_spec("triton") is not None:
        from async_eplb.commit.fused import FusedCommitter  # noqa: PLC0415 - needs Triton

        return FusedCommitter(weights, expert_map)
    return CopyCommitter(weights, expert_map)


@torch.no_grad()
def commit_layer(
    row: int, copies: Sequence[Copy], buffer: StagingBuffer, expert_map: ExpertMap, maps: LayerMaps
) -> int:
    """Copy a layer's staged slots into the live weights and publish its maps, all on the current stream.

    The layer must be staged on every rank.

    :returns: bytes written to live weights
    :raises EplbError: if the buffer is not STAGED
    """
    buffer.enter(BufferState.COMMITTING)
    for dtype in (torch.int32, torch.uint8):
        alike = [copy for copy in copies if copy[0].dtype is dtype]
        if alike:
            torch._foreach_copy_([live for live, _ in alike], [staged for _, staged in alike])
    expert_map.publish(row, maps)
    return sum(live.nbytes for live, _ in copies)


def _in_words(live: Tensor, staged: Tensor) -> Copy:
    """View both as int32 where that fits: lists of bytes are copied at half the speed."""
    places = (live.data_ptr(), live.storage_offset(), staged.data_ptr(), staged.storage_offset(), live.nbytes)
    if any(place % torch.int32.itemsize for place in places):
        return live, staged
    return live.view(torch.int32), staged.view(torch.int32)
