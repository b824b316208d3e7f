"""The definition of checksums, and how to compute them with torch alone."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as a signed integer: the multiplier of Fibonacci hashing (Knuth, TAOCP 6.4)."""


def plain_checksums(slots: Sequence[Sequence[Tensor]]) -> Tensor:
    """Compute a 64-bit checksum of each slot's bytes with torch's operations: int64 ``[slots]``, on their device.

    Each 8-byte word is multiplied by an odd number that depends on its place, and all are added modulo 2**64; so are
    the parts' sums, each times an odd number of its own. So any change of one word changes the sum, and so do almost
    all others.

    :param slots: parts of each slot: contiguous uint8 ``[bytes]``
    """
    weights: dict[int, Tensor] = {}
    sums = []
    for parts in slots:
        total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
        for part, factor in zip(parts, factors_of_parts(len(parts)), strict=True):
            words = _in_words(part)
            if words.numel() not in weights:
                places = torch.arange(1, words.numel() + 1, device=part.device)
                weights[words.numel()] = places.mul_(GOLDEN).bitwise_or_(1)
            total += (words * weights[words.numel()]).sum() * factor
        sums.append(total)
    return torch.stack(sums)


def factors_of_parts(number: int) -> list[int]:
    """Return the factor of the sum of each of a slot's parts: powers of an odd number, as signed 64-bit integers."""
    powers = accumulate(range(number - 1), lambda power, _: _signed(power * GOLDEN), initial=1)
    return [*powers][::-1]


def _in_words(part: Tensor) -> Tensor:
    """Return bytes as int64 words, the last one padded with zeros: a view where size and alignment allow it."""
    if part.numel() % 8 == 0 and part.storage_offset() % 8 == 0 and part.data_ptr() % 8 == 0:
        return part.view(torch.int64)
    words = torch.zeros(-(-part.numel() // 8), dtype=torch.int64, device=part.device)
    words.view(torch.uint8)[: part.numel()].copy_(part)
    return words


def _signed(number: int) -> int:
    """Return the signed 64-bit integer with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
