"""Checksums of many slots as one kernel launch on CUDA. Needs Triton; imported only where there are both."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from async_eplb.scratch import Scratch
from async_eplb.verify.checksum import GOLDEN, factors_of_parts

_GOLDEN = tl.constexpr(GOLDEN)
_VECTOR_NBYTES = tl.constexpr(16)
_BLOCK = tl.constexpr(4096)
"""Words that a program reads at a time."""
_BYTEWISE_BLOCK = tl.constexpr(512)
_NUM_PROGRAMS = 64
"""Programs for each part; in parts with fewer blocks, some end at once."""
_NUM_WARPS = 16


@triton.jit
def _add_part(table, sums):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Add a share of the checksum of one part, an entry of a table int64 ``[parts, 4]``: address, bytes, factor, slot.

    Words at aligned addresses are read in vectors, all others byte by byte.
    """
    entry = table + 4 * tl.program_id(0)
    address = tl.load(entry)
    nbytes = tl.load(entry + 1)
    aligned = (address % _VECTOR_NBYTES == 0).to(tl.int64)
    num_aligned = (aligned * (nbytes // _VECTOR_NBYTES) * (_VECTOR_NBYTES // 8)).to(tl.int32)
    num_words = ((nbytes + 7) // 8).to(tl.int32)
    program = tl.program_id(1)
    num_programs = tl.num_programs(1)

    words = tl.arange(0, _BLOCK)
    content = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
    total = tl.zeros([_BLOCK], dtype=tl.int64)
    for start in range(program * _BLOCK, num_aligned, num_programs * _BLOCK):
        index = tl.multiple_of(start, _BLOCK) + words
        values = tl.load(content + index, mask=index < tl.multiple_of(num_aligned, 2), other=0)
        total += values * (((index + 1).to(tl.int64) * _GOLDEN) | 1)
    share = tl.sum(total, axis=0)

    places = tl.arange(0, 8)[None, :]
    rows = tl.arange(0, _BYTEWISE_BLOCK)[:, None]
    single = address.to(tl.pointer_type(tl.uint8))
    rest = tl.zeros([_BYTEWISE_BLOCK, 8], dtype=tl.int64)
    for start in range(num_aligned + program * _BYTEWISE_BLOCK, num_words, num_programs * _BYTEWISE_BLOCK):
        index = start + rows
        offsets = 8 * index.to(tl.int64) + places
        values = tl.load(single + offsets, mask=offsets < nbytes, other=0).to(tl.int64)
        rest += (values << (8 * places)) * (((index + 1).to(tl.int64) * _GOLDEN) | 1)
    share += tl.sum(tl.sum(rest, axis=1), axis=0)

    if program * _BYTEWISE_BLOCK < num_words:
        tl.atomic_add(sums + tl.load(entry + 3), share * tl.load(entry + 2), sem="relaxed")


def fused_checksums(slots: Sequence[Sequence[Tensor]], scratch: Scratch) -> Tensor:
    """Compute the same as :func:`async_eplb.verify.checksum.plain_checksums`, in one launch on the current stream.

    :param scratch: where the table of parts and the sums are
    """
    device = slots[0][0].device
    entries = [
        (part.data_ptr(), part.nbytes, factor, slot)
        for slot, parts in enumerate(slots)
        for part, factor in zip(parts, factors_of_parts(len(parts)), strict=True)
    ]
    (table,) = scratch.upload(np.array(entries, dtype=np.int64))
    sums = scratch.take(len(slots) * torch.int64.itemsize).view(torch.int64).zero_()
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _add_part[(len(entries), _NUM_PROGRAMS)](table, sums, num_warps=_NUM_WARPS)
    return sums
