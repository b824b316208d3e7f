"""Canaries and checksums: proof that a slot holds the expert that the map says.

A column of int64 travels with each slot like one more weight: the slot's logical expert under the old map and,
on request, a checksum of its bytes taken at the source. What arrives is compared before it may be committed, and
what was committed once more.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import CanaryMismatch, ChecksumMismatch
from async_eplb.weights import ExpertWeights

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as a signed integer: the multiplier of Fibonacci hashing (Knuth, TAOCP 6.4)."""


class Verify(Enum):
    """How moved slots are verified."""

    OFF = "off"
    CANARY = "canary"
    CHECKSUM = "checksum"


class Verifier:
    """Writes and reads the verification column of the weights it made.

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

    def mark(self, row: int, experts: npt.NDArray[np.integer], moving_slots: Iterable[int]) -> None:
        """Write the column before a layer moves, on the current stream.

        :param experts: logical expert of each local slot under the old map
        :param moving_slots: slots that are read by a send or a copy
        """
        if self.mode is Verify.OFF:
            return
        column = self._columns[row]
        column[:, 0].copy_(torch.from_numpy(experts.astype(np.int64)))
        if self.mode is Verify.CHECKSUM:
            for slot in moving_slots:
                column[slot, 1] = checksum([view[slot] for view in self.weights.views(row)[:-1]])

    def check(self, row: int, experts: dict[int, int], content: Mapping[int, Sequence[Tensor]], where: str) -> None:
        """Compare slots with their column. Blocks until the current stream has done so.

        :param experts: slot → the logical expert that it must hold
        :param content: slot → its bytes, one tensor for each of the weights' tensors, the column last
        :param where: "staged" or "live", for the message
        :raises CanaryMismatch: if a slot holds another expert
        :raises ChecksumMismatch: if a slot's bytes differ from what its source held
        """
        if self.mode is Verify.OFF or not content:
            return
        slots = tuple(content)
        columns = torch.stack([content[slot][-1].view(torch.int64) for slot in slots]).cpu()
        expected = [experts[slot] for slot in slots]
        self._compare(CanaryMismatch, row, slots, expected, columns[:, 0].tolist(), where)
        if self.mode is Verify.CHECKSUM:
            sums = torch.stack([checksum(content[slot][:-1]) for slot in slots])
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


def checksum(parts: Sequence[Tensor]) -> Tensor:
    """Return a 64-bit checksum of the bytes of ``parts`` as an int64 scalar on their device.

    Each 8-byte word is multiplied by an odd number that depends on its place, and all are added modulo 2**64. So
    any change of one word changes the sum, and so do almost all others.

    :param parts: contiguous uint8 ``[bytes]`` each
    """
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        words = torch.zeros(-(-part.numel() // 8), dtype=torch.int64, device=part.device)
        words.view(torch.uint8)[: part.numel()].copy_(part)
        factors = (torch.arange(1, words.numel() + 1, device=part.device) * _GOLDEN) | 1
        total = total * _GOLDEN + (words * factors).sum()
    return total
