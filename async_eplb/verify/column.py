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
from async_eplb.verify.checksum import plain_checksums
from async_eplb.weights import ExpertWeights


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

    def warm_up(self) -> None:
        """Verify one slot as it is, on the current stream: so no update waits for kernels to be compiled or loaded.

        CUDA loads a kernel when it is first launched, which can wait for all work of the device: also for a transfer
        whose peer is gone.
        """
        row = self.weights.rows[0]
        content = {0: self.weights.slot_views(row, 0)}
        self.mark(row, np.zeros(self.weights.num_local_physical_experts, dtype=np.int64), content)
        self.check(row, {0: 0}, content, "live")

    def mark(self, row: int, experts: npt.NDArray[np.integer], moving_slots: Iterable[int]) -> None:
        """Write the column of a layer before the layer is moved, on the current stream.

        :param experts: logical expert of each local slot under the old map: ``[slots]``
        :param moving_slots: slots that are read by a send or a copy
        """
        if self.mode is Verify.OFF:
            return
        column = self._columns[row]
        column[:, 0].copy_(torch.from_numpy(experts.astype(np.int64)))
        if self.mode is Verify.CHECKSUM:
            slots = [*moving_slots]
            if slots:
                sums = checksums([self.weights.slot_views(row, slot)[:-1] for slot in slots])
                places = torch.from_numpy(np.array(slots, dtype=np.int64))
                column[:, 1].index_copy_(0, places.to(column.device), sums)

    def check(self, row: int, experts: dict[int, int], content: Mapping[int, Sequence[Tensor]], where: str) -> None:
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
        columns = torch.stack([content[slot][-1].view(torch.int64) for slot in slots]).cpu()  # [slots, 2]
        expected = [experts[slot] for slot in slots]
        self._compare(CanaryMismatch, row, slots, expected, columns[:, 0].tolist(), where)
        if self.mode is Verify.CHECKSUM:
            sums = checksums([content[slot][:-1] for slot in slots])
            self._compare(ChecksumMismatch, row, slots, columns[:, 1].tolist(), sums.tolist(), where)

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


def checksums(slots: Sequence[Sequence[Tensor]]) -> Tensor:
    """Compute the checksum of each slot, int64 ``[slots]``, without waiting for the device: with Triton if it is there.

    :param slots: parts of each slot, as for :func:`plain_checksums`
    """
    if slots and slots[0][0].is_cuda and find_spec("triton") is not None:
        from async_eplb.verify.fused_checksum import fused_checksums  # noqa: PLC0415 - needs Triton

        return fused_checksums(slots)
    return plain_checksums(slots)
