"""Staging buffers: where a layer's new slots wait until they are committed everywhere.

A buffer's life is the table below. A buffer is only ever in one state, and every change of state goes through
:meth:`StagingBuffer.enter`::

    FREE ──acquire──> FILLING ──full──> STAGED ──agreed──> COMMITTING ──copied──> FREE
                         │                 ^────copy failed────┘                    ^
                         └──────abandoned──┴────────────────────────────────────────┘
"""

from collections.abc import Sequence
from enum import Enum
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from anyio import Semaphore
from torch import Tensor

from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import EplbError

_ALIGNMENT = 256


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


class StagingBuffer:
    """Memory for the staged slots of one layer.

    :param memory: uint8 ``[bytes]``
    """

    def __init__(self, index: int, memory: Tensor, device: Device) -> None:
        self.index = index
        self.state = BufferState.FREE
        self.consumed: DeviceEvent = device.record()
        """Recorded after the last copies that read this buffer; its next filling waits for this event (rule 5)."""
        self.slot_nbytes: tuple[int, ...] = ()
        """Bytes of a slot in each tensor."""
        self.spare: Tensor = memory[:0]
        """Memory beside the slots, for the committer: uint8 ``[bytes]``, aligned as slots are."""
        self.memory = memory
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

    def lay_out(self, slots: Sequence[int], slot_nbytes: Sequence[int], *, spare_nbytes: int = 0) -> None:
        """Divide the buffer: one aligned block for each slot and tensor, then :attr:`spare`.

        :param slot_nbytes: bytes of a slot in each tensor
        """
        *self._offsets, self._stride = accumulate((_aligned(nbytes) for nbytes in slot_nbytes), initial=0)
        self.slot_nbytes = tuple(slot_nbytes)
        self._places = {slot: place for place, slot in enumerate(slots)}
        end = len(slots) * self._stride
        self.spare = self.memory[end : end + spare_nbytes]

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

    The constructor makes empty buffers, which takes no device memory; :meth:`reserve` gives them memory.

    :param depth: number of buffers
    """

    def __init__(self, depth: int, device: Device) -> None:
        self._device = device
        self._depth = depth
        self._free = Semaphore(depth)
        self._cut(0)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the pool has allocated."""
        return int(self._memory.nbytes)

    @property
    def all_free(self) -> bool:
        """Whether no buffer is in use."""
        return all(buffer.state is BufferState.FREE for buffer in self.buffers)

    def reserve(self, layer_nbytes: int) -> None:
        """Make each buffer at least ``layer_nbytes`` large; the pool never shrinks.

        Blocks. The device's cached memory is freed before the pool allocates, so that it does not add to the peak.

        :raises EplbError: if a buffer is in use
        """
        if not self.all_free:
            raise EplbError(f"staging cannot be resized while it is in use: {self.buffers}")
        if layer_nbytes * self._depth <= self.nbytes:
            return
        # Rule 10 is broken here, but only while nothing of an update is under way.
        for buffer in self.buffers:
            buffer.consumed.synchronize()
        with self._device.transferring():  # waits for transfers that a failed update has still under way
            self._device.record().synchronize()
        self._cut(0)
        self._device.empty_cache()
        self._cut(layer_nbytes)

    def _cut(self, layer_nbytes: int) -> None:
        """Replace all buffers by new ones of this size. If allocating fails, the old ones stay."""
        self._memory = self._device.allocate(layer_nbytes * self._depth)
        blocks = self._memory.view(self._depth, layer_nbytes)
        self.buffers = tuple(StagingBuffer(i, blocks[i], self._device) for i in range(self._depth))

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
    def layer_nbytes(num_slots: int, slot_nbytes: Sequence[int], *, spare_nbytes: int = 0) -> int:
        """Return the bytes of a buffer for ``num_slots`` slots of a layer and ``spare_nbytes`` beside them.

        :param slot_nbytes: bytes of a slot in each tensor
        """
        return num_slots * sum(_aligned(nbytes) for nbytes in slot_nbytes) + _aligned(spare_nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
