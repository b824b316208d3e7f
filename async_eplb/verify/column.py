"""Canaries and checksums: verification that a slot holds the expert in the map.

A column of int64 ``[slots, 2]`` moves with the slots like one more weight: each slot's logical expert under the old map
and, on request, a checksum of its bytes, taken where they are sent from. Slots are compared with it when they have
arrived, before they may be committed, and once more after the commit.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import CanaryMismatch, ChecksumMismatch
from async_eplb.scratch import Scratch, aligned
from async_eplb.verify.checksum import plain_checksums
from async_eplb.weights import ExpertWeights

_ENTRY_NBYTES = 16
"""Of a slot in the column: two int64."""


class Verify(Enum):
    """How moved slots are verified."""

    OFF = "off"
    CANARY = "canary"
    CHECKSUM = "checksum"


class Verifier:
    """Writes and compares the verification column of live weights.

    The constructor allocates the column on the device, once, since the addresses of weights must not change (rule 7);
    :attr:`weights` are the live weights with the column.

    :param weights: live weights without the column
    """

    def __init__(self, mode: Verify, weights: ExpertWeights, rank: int) -> None:
        self._rank = rank
        self.mode = mode
        self._columns: dict[int, Tensor] = {}
        self.weights = weights
        if mode is not Verify.OFF:
            shape = (weights.num_local_physical_experts, 2)
            self._columns = {row: torch.zeros(shape, dtype=torch.int64, device=weights.device) for row in weights.rows}
            self.weights = weights.with_column(self._columns, "the verification column")

    @property
    def nbytes(self) -> int:
        """Bytes of the column on the device, of all layers."""
        return sum(column.nbytes for column in self._columns.values())

    def scratch_nbytes(self, row: int) -> int:
        """Return the most bytes of scratch that one mark and two checks of a layer take."""
        if self.mode is Verify.OFF:
            return 0
        slots, parts = self.weights.num_local_physical_experts, len(self.weights.slot_nbytes(row)) - 1
        return 3 * (aligned(slots * _ENTRY_NBYTES) + checksum_scratch_nbytes(slots, parts))

    def warm_up(self, scratch: Scratch) -> None:
        """Read one slot as it is, on the current stream: so no update waits for kernels to be compiled or loaded.

        CUDA loads a kernel when it is first launched, which can wait for all work of the device: also for a transfer
        whose peer is gone.
        """
        if self.mode is Verify.OFF:
            return
        row = self.weights.rows[0]
        content = {0: self.weights.slot_views(row, 0)}
        self.mark(row, np.zeros(self.weights.num_local_physical_experts, dtype=np.int64), content, scratch)
        self._read(content, scratch)

    def mark(self, row: int, experts: npt.NDArray[np.integer], moving_slots: Iterable[int], scratch: Scratch) -> None:
        """Write the column of a layer before the layer is moved, on the current stream.

        :param experts: logical expert of each local slot under the old map: ``[slots]``
        :param moving_slots: slots that are read by a send or a copy
        """
        if self.mode is Verify.OFF:
            return
        column = self._columns[row]
        (held,) = scratch.upload(experts.astype(np.int64))
        column[:, 0].copy_(held)
        slots = [*moving_slots]
        if self.mode is Verify.CHECKSUM and slots:
            sums = checksums([self.weights.slot_views(row, slot)[:-1] for slot in slots], scratch)
            torch._foreach_copy_([column[slot, 1] for slot in slots], [*sums.unbind()])

    def check(
        self,
        row: int,
        experts: dict[int, int],
        content: Mapping[int, Sequence[Tensor]],
        where: str,
        scratch: Scratch,
    ) -> None:
        """Compare slots with their column. Blocks until the current stream has read them, so not in a step (rule 3).

        :param experts: slot → the logical expert that it must hold
        :param content: slot → its bytes, uint8 ``[bytes]`` for each of the weights' tensors, the column last
        :param where: "staged" or "live", for the message
        :raises CanaryMismatch: if a slot holds another expert
        :raises ChecksumMismatch: if a slot's bytes are not those that were sent
        """
        if self.mode is Verify.OFF or not content:
            return
        slots = tuple(content)
        columns, sums = self._read(content, scratch)
        expected = [experts[slot] for slot in slots]
        self._compare(CanaryMismatch, row, slots, expected, [expert for expert, _ in columns], where)
        if self.mode is Verify.CHECKSUM:
            self._compare(ChecksumMismatch, row, slots, [taken for _, taken in columns], sums, where)

    def _read(
        self, content: Mapping[int, Sequence[Tensor]], scratch: Scratch
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the column of slots, and their checksums as they are now, if these are compared."""
        entries = scratch.take(len(content) * _ENTRY_NBYTES).view(-1, _ENTRY_NBYTES)
        torch._foreach_copy_([*entries.unbind()], [parts[-1] for parts in content.values()])
        columns: list[tuple[int, int]] = entries.view(torch.int64).tolist()
        if self.mode is Verify.CANARY:
            return columns, []
        return columns, checksums([parts[:-1] for parts in content.values()], scratch).tolist()

    def _compare(
        self,
        error: type[CanaryMismatch | ChecksumMismatch],
        row: int,
        slots: tuple[int, ...],
        expected: list[int],
        actual: list[int],
        where: str,
    ) -> None:
        wrong = tuple(slot for slot, e, a in zip(slots, expected, actual, strict=True) if e != a)
        if wrong:
            what = "logical experts" if error is CanaryMismatch else "checksums"
            raise error(
                f"layer {row}, rank {self._rank}: {where} slots {list(wrong)} are wrong; {what} of slots "
                f"{list(slots)} should be {expected} and are {actual}",
                layer=row,
                rank=self._rank,
                slots=wrong,
                expected=expected,
                actual=actual,
            )


def checksums(slots: Sequence[Sequence[Tensor]], scratch: Scratch) -> Tensor:
    """Compute the checksum of each slot, int64 ``[slots]``, without waiting for the device: with Triton if it is there.

    Only without Triton this takes device memory, besides scratch.

    :param slots: parts of each slot, as for :func:`plain_checksums`
    :param scratch: with :func:`checksum_scratch_nbytes` left
    """
    if slots and slots[0][0].is_cuda and find_spec("triton") is not None:
        from async_eplb.verify.fused_checksum import fused_checksums  # noqa: PLC0415 - needs Triton

        return fused_checksums(slots, scratch)
    return plain_checksums(slots)


def checksum_scratch_nbytes(num_slots: int, num_parts: int) -> int:
    """Return the bytes of scratch that :func:`checksums` of slots with so many parts takes at most."""
    return aligned(num_slots * num_parts * 4 * torch.int64.itemsize) + aligned(num_slots * torch.int64.itemsize)
