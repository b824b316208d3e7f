"""Staging buffers: where a layer's new slots wait until they are committed everywhere.

A buffer's life is the table below. A buffer is only ever in one state, and every change of state goes through
:meth:`StagingBuffer.enter`::

    FREE ──acquire──> FILLING ──full──> STAGED ──agreed──> COMMITTING ──copied──> FREE
                         │                 ^────copy failed────┘                    ^
                         └──────abandoned──┴────────────────────────────────────────┘
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from anyio import Semaphore
from torch import Tensor

from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import EplbError
from async_eplb.scratch import Scratch, aligned


class BufferState(Enum):
    """State of a staging buffer; the table in the module's docstring names the transitions."""

    FREE = "free"
    FILLING = "filling"
    STAGED = "staged"
    COMMITTING = "committing"


_ALLOWED = {
    BufferState.FREE: {BufferState.FILLING},
    BufferState.FILLING: {BufferState.STAGED, BufferState.FREE},
    BufferState.STAGED: {BufferState.COMMITTING, BufferState.FREE},
    BufferState.COMMITTING: {BufferState.FREE, BufferState.STAGED},
}


@dataclass(frozen=True, slots=True)
class BufferSize:
    """Bytes of each staging buffer.

    :param slots_nbytes: for staged slots
    :param scratch_nbytes: for what a layer needs beside them; as much again on the host
    """

    slots_nbytes: int
    scratch_nbytes: int = 0


class StagingBuffer:
    """Memory for the staged slots of one layer, and for what it needs beside them.

    :param memory: of the slots: uint8 ``[bytes]``
    :param scratch_nbytes: for the layer's commit and verification
    """

    def __init__(self, index: int, memory: Tensor, device: Device, *, scratch_nbytes: int = 0) -> None:
        self.index = index
        self.state = BufferState.FREE
        self.consumed: DeviceEvent = device.record()
        """Recorded after the last copies that read this buffer; its next filling waits for this event (rule 5)."""
        self.slot_nbytes: tuple[int, ...] = ()
        """Bytes of a slot in each tensor."""
        self.memory = memory
        self.scratch = Scratch(device, scratch_nbytes)
        """Memory beside the slots, for the committer and the verifier."""
        self._places: dict[int, int] = {}
        self._offsets: list[int] = []
        self._stride = 0

    def __repr__(self) -> str:
        return f"<StagingBuffer {self.index} {self.state.value}: slots {sorted(self._places)}>"

    def enter(self, state: BufferState) -> None:
        """Change the state.

        :raises EplbError: if the table does not allow it; the state is then unchanged
        """
        if state not in _ALLOWED[self.state]:
            raise EplbError(f"staging buffer {self.index} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def lay_out(self, slots: Sequence[int], slot_nbytes: Sequence[int]) -> None:
        """Divide the buffer for another layer: one aligned block for each slot and tensor, and all of :attr:`scratch`.

        Blocks as :meth:`Scratch.clear` does.

        :param slot_nbytes: bytes of a slot in each tensor
        """
        self.scratch.clear()
        *self._offsets, self._stride = accumulate((aligned(nbytes) for nbytes in slot_nbytes), initial=0)
        self.slot_nbytes = tuple(slot_nbytes)
        self._places = {slot: place for place, slot in enumerate(slots)}

    def addresses(self, slots: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the addresses of the staging of slots: int64 ``[slots, tensors]``."""
        places = np.array([self._places[slot] for slot in slots], dtype=np.int64)
        return self.memory.data_ptr() + places[:, None] * self._stride + np.array(self._offsets, dtype=np.int64)

    def views(self, slot: int) -> tuple[Tensor, ...]:
        """Return the staging of a slot: uint8 ``[bytes]`` for each tensor of the layer."""
        starts = (self._places[slot] * self._stride + offset for offset in self._offsets)
        return tuple(self.memory[start : start + n] for start, n in zip(starts, self.slot_nbytes, strict=True))


class StagingPool:
    """Staging buffers of an updater, one for each layer in flight; taking one waits until one is free.

    The constructor makes empty buffers, which takes no memory; :meth:`allocate` gives them all they will ever have.

    :param depth: number of buffers
    """

    def __init__(self, depth: int, device: Device, size: BufferSize) -> None:
        self._device = device
        self._size = size
        self._free = Semaphore(depth)
        memory = device.allocate(0)
        self.buffers = tuple(StagingBuffer(index, memory, device) for index in range(depth))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the pool has, or will have when it is allocated."""
        return len(self.buffers) * (self._size.slots_nbytes + self._size.scratch_nbytes)

    def allocate(self) -> None:
        """Give all buffers their memory, before the first is used. Blocks."""
        depth, nbytes = len(self.buffers), self._size.slots_nbytes
        blocks = self._device.allocate(depth * nbytes).view(depth, nbytes)
        self.buffers = tuple(
            StagingBuffer(index, block, self._device, scratch_nbytes=self._size.scratch_nbytes)
            for index, block in enumerate(blocks)
        )

    async def acquire(self) -> StagingBuffer:
        """Wait for a free buffer and return it, FILLING."""
        await self._free.acquire()
        buffer = next(buffer for buffer in self.buffers if buffer.state is BufferState.FREE)
        buffer.enter(BufferState.FILLING)
        return buffer

    def release(self, buffer: StagingBuffer) -> None:
        """Give a buffer back, FREE."""
        buffer.enter(BufferState.FREE)
        self._free.release()

    @staticmethod
    def layer_nbytes(num_slots: int, slot_nbytes: Sequence[int]) -> int:
        """Return the bytes that ``num_slots`` slots of a layer take in a buffer.

        :param slot_nbytes: bytes of a slot in each tensor
        """
        return num_slots * sum(aligned(nbytes) for nbytes in slot_nbytes)
