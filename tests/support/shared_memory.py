"""Memory of CPUs that processes share as GPUs of a host share theirs, and hosts that are not there."""

import ctypes
import mmap
import os
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from async_eplb import groups
from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.transport.copy_engine.cuda_ipc import Step
from async_eplb.transport.copy_engine.turns import Cell

_ALIGNMENT = 64


class SharedMemory(CpuDevice):
    """A device whose allocations other processes can map, and the :class:`PeerMemory` that does so."""

    def __init__(self) -> None:
        self._allocations: dict[int, tuple[int, int]] = {}
        self.mapped: dict[int, Tensor] = {}
        """What is mapped of other processes, by address."""
        self.mapped_host: set[int] = set()

    def allocate(self, nbytes: int) -> Tensor:
        """Return memory of a file that has no name."""
        file = os.memfd_create("weights")
        os.ftruncate(file, max(nbytes, 1))
        memory = _map(file)
        freed = self._allocations.pop(memory.data_ptr(), None)  # what was mapped at this address is no more
        if freed is not None:
            os.close(freed[0])
        self._allocations[memory.data_ptr()] = (file, nbytes)
        return memory[:nbytes]

    def share(self, tensors: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        """Return equal tensors in shared memory: one allocation for each row, as caching allocators cut theirs up."""
        shared: dict[int, list[Tensor]] = {}
        for row, originals in tensors.items():
            block = self.allocate(sum(_aligned(tensor.nbytes) for tensor in originals))
            shared[row] = []
            for tensor in originals:
                copy = block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copy.copy_(tensor)
                shared[row].append(copy)
                block = block[_aligned(tensor.nbytes) :]
        return shared

    def export(self, address: int) -> tuple[int, bytes]:
        """Return an allocation's address, and the name under which other processes see its file."""
        for base, (file, nbytes) in reversed(self._allocations.items()):  # an older one there is no more
            if base <= address < base + nbytes:
                return base, f"/proc/{os.getpid()}/fd/{file}".encode()
        raise RuntimeError("this memory cannot be shared")

    def open(self, handle: bytes) -> int:
        """Map a file of another process."""
        file = os.open(handle.decode(), os.O_RDWR)
        memory = _map(file)
        os.close(file)
        self.mapped[memory.data_ptr()] = memory
        return memory.data_ptr()

    def close(self, address: int) -> None:
        """Forget a mapping."""
        del self.mapped[address]

    def free(self) -> None:
        """Close the files of all allocations, which live on only where they are mapped."""
        for file, _ in self._allocations.values():
            os.close(file)
        self._allocations.clear()

    def map_host(self, address: int, nbytes: int) -> int:
        """Return the same address: the device is the host."""
        assert nbytes > 0
        self.mapped_host.add(address)
        return address

    def unmap_host(self, address: int) -> None:
        """Forget host memory."""
        self.mapped_host.remove(address)

    def copy(self, steps: Sequence[Step]) -> None:
        """Copy at once, when its turn has come: a thread is the stream, and waits as a device does."""
        for copies, after, then in steps:
            while after is not None and (_cell(after).value - after.number) % (1 << 32) >= 1 << 31:
                time.sleep(20e-6)
            for target, source, nbytes in copies.rows():
                ctypes.memmove(target, source, nbytes)
            if then is not None:
                _cell(then).value = then.number

    def end(self) -> DeviceEvent:
        """Return an event that has passed."""
        return self.record()


class _BootId:
    def __init__(self, number: int) -> None:
        self._number = number

    def read_text(self) -> str:
        return f"host {self._number}\n"


def be_on_host(number: int) -> None:
    """Let transports of this process take it for one of a host of its own, with other processes of that number."""
    groups.BOOT_ID = _BootId(number)  # type: ignore[assignment]


def _cell(cell: Cell) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(cell.address)


def _map(file: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, os.fstat(file).st_size), dtype=torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
