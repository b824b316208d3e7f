"""Staging buffers: their states, their memory, and the waits for them."""

from itertools import product

import anyio
import pytest
import torch
from torch import Tensor

from async_eplb.device import CpuDevice
from async_eplb.errors import EplbError
from async_eplb.staging import BufferState, StagingPool

FREE, FILLING, STAGED, COMMITTING = BufferState

ALLOWED = {
    (FREE, FILLING),
    (FILLING, STAGED),
    (FILLING, FREE),
    (STAGED, COMMITTING),
    (STAGED, FREE),
    (COMMITTING, FREE),
    (COMMITTING, STAGED),
}


class RecordedEvent:
    """Remembers that it was waited for."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._calls.append("synchronize")


class RecordingDevice(CpuDevice):
    """Remembers what its allocator was asked to do, and which events were waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self) -> "RecordedEvent":
        return RecordedEvent(self.calls)

    def allocate(self, nbytes: int) -> Tensor:
        if nbytes:
            self.calls.append(f"allocate {nbytes}")
        return super().allocate(nbytes)

    def empty_cache(self) -> None:
        self.calls.append("empty cache")


@pytest.mark.parametrize(("before", "after"), list(product(BufferState, BufferState)))
def test_a_buffer_changes_state_by_the_table_only(before: BufferState, after: BufferState) -> None:
    """Transitions outside the table are refused, and the buffer stays as it was."""
    (buffer,) = StagingPool(1, CpuDevice()).buffers
    buffer.state = before
    if (before, after) in ALLOWED:
        buffer.enter(after)
        assert buffer.state is after
    else:
        with pytest.raises(EplbError, match=f"from {before.value} to {after.value}"):
            buffer.enter(after)
        assert buffer.state is before


def test_the_cache_is_emptied_before_staging_is_allocated() -> None:
    """When the pool is first used or grows, after the last copies out of its buffers, and into them."""
    device = RecordingDevice()
    pool = StagingPool(2, device)
    pool.reserve(1024)
    waits = ["synchronize"] * 3
    assert device.calls == [*waits, "empty cache", "allocate 2048"]
    pool.reserve(2048)
    assert device.calls[5:] == [*waits, "empty cache", "allocate 4096"]


def test_a_reservation_that_fits_costs_nothing() -> None:
    """A steady run of updates allocates once."""
    device = RecordingDevice()
    pool = StagingPool(2, device)
    pool.reserve(1024)
    device.calls.clear()
    for nbytes in (1024, 512, 0):
        pool.reserve(nbytes)
    assert device.calls == []


def test_slots_are_laid_out_apart_and_aligned() -> None:
    """Each tensor of each slot has memory of its own, at a multiple of 256 bytes."""
    pool = StagingPool(2, CpuDevice())
    pool.reserve(StagingPool.layer_nbytes(2, (300, 4)))
    assert pool.nbytes == 2 * 2 * (512 + 256)
    for buffer in pool.buffers:
        buffer.lay_out((5, 1), (300, 4))
    views = [view for buffer in pool.buffers for slot in (5, 1) for view in buffer.views(slot)]
    assert [view.numel() for view in views] == [300, 4] * 4
    starts = [view.data_ptr() for view in views]
    assert [start - starts[0] for start in starts] == [0, 512, 768, 1280, 1536, 2048, 2304, 2816]
    for number, view in enumerate(views):
        view.fill_(number)
    assert all(torch.all(view == number) for number, view in enumerate(views))


def test_staging_in_use_is_not_resized() -> None:
    """Somebody else's exchange may be writing there."""
    pool = StagingPool(2, CpuDevice())
    pool.reserve(256)
    pool.buffers[1].enter(FILLING)
    with pytest.raises(EplbError, match="in use"):
        pool.reserve(512)


@pytest.mark.anyio
async def test_taking_a_buffer_waits_until_one_is_free() -> None:
    """As many layers are in flight as there are buffers."""
    pool = StagingPool(2, CpuDevice())
    taken = [await pool.acquire() for _ in range(2)]
    assert [buffer.state for buffer in taken] == [FILLING] * 2
    with anyio.move_on_after(0.01) as waited:
        await pool.acquire()
    assert waited.cancelled_caught
    pool.release(taken[1])
    assert await pool.acquire() is taken[1]
