"""Checksums of many slots as one kernel launch: what torch's operations make of the same bytes."""

from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from async_eplb.device import device_for
from async_eplb.scratch import Scratch
from async_eplb.verify.checksum import plain_checksums
from async_eplb.verify.column import checksum_scratch_nbytes, checksums

SIZES = (1, 7, 8, 15, 16, 4096, 32768, 70_001, 1_000_003, 9 << 20)


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def scratch_for(slots: Sequence[Sequence[Tensor]]) -> Scratch:
    """Return what the checksums of slots need."""
    most_parts = max(len(parts) for parts in slots)
    return Scratch(device_for(slots[0][0].device), checksum_scratch_nbytes(len(slots), most_parts))


def checksum(part: Tensor) -> int:
    """Return the checksum of a slot of one part."""
    return int(checksums([[part]], scratch_for([[part]])))


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 24])
def test_it_is_the_same_checksum(cuda: torch.device, offset: int) -> None:
    """Of parts of all sizes, at all alignments, on a CPU, and on the device with and without Triton."""
    generator = torch.Generator().manual_seed(offset)
    memory = torch.randint(256, (3, 10 << 20), dtype=torch.uint8, generator=generator)
    there = memory.to(cuda)
    cut = [[(row, offset, size) for size in SIZES] for row in range(3)] + [[(0, offset + 1, SIZES[-2])]]
    slots, slots_there = (
        [[of[row, start : start + size] for row, start, size in parts] for parts in cut] for of in (memory, there)
    )
    expected = plain_checksums(slots)
    assert torch.equal(checksums(slots_there, scratch_for(slots_there)).cpu(), expected)
    assert torch.equal(plain_checksums(slots_there).cpu(), expected)


def test_any_byte_counts(cuda: torch.device) -> None:
    """Also the first and the last, of words that are read in vectors and of those that are not."""
    memory = torch.zeros(100_003, dtype=torch.uint8, device=cuda)
    before = checksum(memory)
    for place in (0, 7, 8, 16, 32_767, 32_768, 65_536, 99_999, 100_000, 100_002):
        memory[place] = 1
        assert checksum(memory) != before
        memory[place] = 0
    assert checksum(memory) == before


def test_it_is_one_kernel_that_nobody_waits_for(cuda: torch.device) -> None:
    """Besides it, the sums are set to zero and a table of parts is copied there."""
    slots = [[torch.zeros(1 << 20, dtype=torch.uint8, device=cuda)] * 4 for _ in range(9)]
    scratch = scratch_for(slots)
    checksums(slots, scratch)
    torch.cuda.synchronize()
    scratch.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        checksums(slots, scratch)
        end.record()
        waited = end.query()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    assert not waited
    names = [event.name for event in profile.events()]
    assert sum("_add_part" in name for name in names) == 1
