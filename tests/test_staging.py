"""Staging buffers: their states, their memory, and the waits for them."""

from itertools import product

import anyio
import pytest
import torch
from torch import Tensor

from async_eplb.device import CpuDevice
from async_eplb.errors import EplbError
from async_eplb.staging import BufferSize, BufferState, StagingPool

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


class CountingDevice(CpuDevice):
    """Remembers how many bytes it was asked for."""

    def __init__(self) -> None:
        self.allocated: list[int] = []

    def allocate(self, nbytes: int) -> Tensor:
        if nbytes:
            self.allocated.append(nbytes)
        return super().allocate(nbytes)


@pytest.mark.parametrize(("before", "after"), list(product(BufferState, BufferState)))
def test_a_buffer_changes_state_by_the_table_only(before: BufferState, after: BufferState) -> None:
    """Transitions outside the table are refused, and the buffer stays as it was."""
    (buffer,) = StagingPool(1, CpuDevice(), BufferSize(0)).buffers
    buffer.state = before
    if (before, after) in ALLOWED:
        buffer.enter(after)
        assert buffer.state is after
    else:
        with pytest.raises(EplbError, match=f"from {before.value} to {after.value}"):
            buffer.enter(after)
        assert buffer.state is before


def test_all_memory_is_allocated_at_once() -> None:
    """None by the constructor; how much it will be is known before."""
    device = CountingDevice()
    pool = StagingPool(2, device, BufferSize(1024, 512))
    assert (device.allocated, pool.nbytes) == ([], 3072)
    pool.allocate()
    assert (device.allocated, pool.nbytes) == ([2048, 512, 512], 3072)


def test_slots_are_laid_out_apart_and_aligned() -> None:
    """Each tensor of each slot has memory of its own, at a multiple of 256 bytes."""
    pool = StagingPool(2, CpuDevice(), BufferSize(StagingPool.layer_nbytes(2, (300, 4))))
    pool.allocate()
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


@pytest.mark.anyio
async def test_taking_a_buffer_waits_until_one_is_free() -> None:
    """As many layers are in flight as there are buffers."""
    pool = StagingPool(2, CpuDevice(), BufferSize(0))
    taken = [await pool.acquire() for _ in range(2)]
    assert [buffer.state for buffer in taken] == [FILLING] * 2
    with anyio.move_on_after(0.01) as waited:
        await pool.acquire()
    assert waited.cancelled_caught
    pool.release(taken[1])
    assert await pool.acquire() is taken[1]
