"""Memory of other processes on this host, read by plain copies of the CUDA driver: IPC handles, no kernels.

The driver is called directly. PyTorch's own way to share a tensor replaces the owner of the memory that it is called
for, and its copies between devices run on a stream of the peer's device, in a context that they make there.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from async_eplb.device import DeviceEvent, SideStream
from async_eplb.transport.copy_engine.turns import Cell

Numbers = npt.NDArray[np.int64]


class Copies(NamedTuple):
    """Copies in any order: int64 ``[copies]`` each.

    :param targets: addresses to write
    :param sources: addresses to read
    """

    targets: Numbers
    sources: Numbers
    nbytes: Numbers

    @classmethod
    def of(cls, copies: Sequence[tuple[int, int, int]]) -> "Copies":
        """Make columns of target, source and bytes of each copy."""
        return cls(*np.array(copies, dtype=np.int64).reshape(-1, 3).T.copy())

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Return target, source and bytes of each copy."""
        return zip(*(column.tolist() for column in self), strict=True)

    @property
    def number(self) -> int:
        """How many copies these are."""
        return len(self.nbytes)


class Step(NamedTuple):
    """Copies from one peer.

    :param after: the cell and number that the device waits for before the copies
    :param then: the cell and number that the device writes after them
    """

    copies: Copies
    after: Cell | None = None
    then: Cell | None = None


class PeerMemory(Protocol):
    """How one process reads the memory of others. All methods raise RuntimeError, with the reason."""

    def export(self, address: int) -> tuple[int, bytes]:
        """Return the first address of the allocation that ``address`` is in, and a handle for other processes."""
        ...

    def open(self, handle: bytes) -> int:
        """Map an allocation of another process; return its first address here."""
        ...

    def close(self, address: int) -> None:
        """Undo an :meth:`open`. Nothing may read there any more."""
        ...

    def map_host(self, address: int, nbytes: int) -> int:
        """Make host memory accessible to the device; return its first address there."""
        ...

    def unmap_host(self, address: int) -> None:
        """Undo a :meth:`map_host` of a host address."""
        ...

    def copy(self, steps: Sequence[Step]) -> None:
        """Enqueue steps behind the current stream, which does not wait for them, one after another."""
        ...

    def end(self) -> DeviceEvent:
        """Return the end of all copies so far, also of those before one that could not be enqueued."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * 64),)


class _BatchAttributes(ctypes.Structure):
    """Attributes of all copies of a batch; hints that are zero are not given."""

    _fields_ = (("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


_ADDRESS = ctypes.c_uint64
_POINTER = ctypes.c_void_p
_BATCH = "cuMemcpyBatchAsync_v2"
_SIGNATURES = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_POINTER, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, ctypes.c_int),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuPointerGetAttribute": (_POINTER, ctypes.c_int, _ADDRESS),
    "cuIpcGetMemHandle": (_POINTER, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_POINTER, _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemHostRegister_v2": (_POINTER, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostGetDevicePointer_v2": (_POINTER, _POINTER, ctypes.c_uint),
    "cuMemHostUnregister": (_POINTER,),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, ctypes.c_size_t, _POINTER),
    _BATCH: (_POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER, _POINTER, ctypes.c_size_t, _POINTER),
    "cuStreamWaitValue32_v2": (_POINTER, _ADDRESS, ctypes.c_uint32, ctypes.c_uint),
    "cuStreamWriteValue32_v2": (_POINTER, _ADDRESS, ctypes.c_uint32, ctypes.c_uint),
    "cuGetErrorName": (ctypes.c_int, _POINTER),
}
_IS_LEGACY_CUDA_IPC_CAPABLE = 10
_RANGE_START_ADDR = 11
_LAZY_ENABLE_PEER_ACCESS = 1
_MAPPED_FOR_DEVICES = 2
_UNTIL_REACHED = 0
"""Cyclically: as long as a cell is less than half of all numbers behind."""
_IN_STREAM_ORDER = 1
_BESIDE_KERNELS = 1
_MANY_COPIES = 400
"""A stream takes about 1,000 before it blocks the thread that enqueues more, and two layers can be under way."""


class CudaIpc:
    """:class:`PeerMemory` of one CUDA device.

    :raises RuntimeError: if the device is no CUDA device, or there is no driver
    """

    def __init__(self, torch_device: torch.device) -> None:
        if torch_device.type != "cuda":
            raise RuntimeError(f"weights are on {torch_device}, and only CUDA devices share memory between processes")
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"there is no CUDA driver ({error})") from error
        self._driver_with_lock = ctypes.PyDLL("libcuda.so.1")
        self.in_batches = hasattr(self._driver, _BATCH)
        """Whether copies are enqueued in batches, which drivers can since CUDA 13."""
        for driver in (self._driver, self._driver_with_lock):
            for function, arguments in _SIGNATURES.items():
                if function != _BATCH or self.in_batches:
                    getattr(driver, function).argtypes = arguments
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self._side = SideStream(torch_device)

    def export(self, address: int) -> tuple[int, bytes]:
        """Return the first address of an allocation and its handle.

        :raises RuntimeError: for memory that has none, such as that of expandable segments
        """
        with self._entered():
            if not self._attribute(_IS_LEGACY_CUDA_IPC_CAPABLE, address):
                raise RuntimeError(
                    "weights are in memory without CUDA IPC handles: allocate them by cudaMalloc, without "
                    "expandable_segments, cudaMallocAsync or an allocator of virtual memory (sleep modes use one)"
                )
            base = self._attribute(_RANGE_START_ADDR, address)
            handle = _Handle()
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return base, bytes(handle.data)

    def open(self, handle: bytes) -> int:
        """Map an allocation; where it is on another device, with peer access to that."""
        address = ctypes.c_uint64()
        with self._entered():
            opened = _Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), opened, _LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def close(self, address: int) -> None:
        """Unmap an allocation."""
        with self._entered():
            self._call("cuIpcCloseMemHandle", address)

    def map_host(self, address: int, nbytes: int) -> int:
        """Register host memory with the driver; return its address for the device."""
        mapped = ctypes.c_uint64()
        with self._entered():
            self._call("cuMemHostRegister_v2", address, nbytes, _MAPPED_FOR_DEVICES)
            self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), address, 0)
        return mapped.value

    def unmap_host(self, address: int) -> None:
        """Unregister host memory from the driver."""
        with self._entered():
            self._call("cuMemHostUnregister", address)

    def copy(self, steps: Sequence[Step]) -> None:
        """Enqueue steps on one stream: a device has one engine for copies between devices, and takes one at a time."""
        may_block = sum(step.copies.number for step in steps) > _MANY_COPIES or any(step.after for step in steps)
        with self._entered(), self._side.aside() as stream:
            for copies, after, then in steps:
                if after is not None:
                    self._call("cuStreamWaitValue32_v2", stream, *after, _UNTIL_REACHED)
                if self.in_batches:
                    self._enqueue_batch(copies, stream)
                else:
                    self._enqueue_each(copies, stream, may_block=may_block)
                if then is not None:
                    self._call("cuStreamWriteValue32_v2", stream, *then, 0)

    def end(self) -> DeviceEvent:
        """Return the end of all copies."""
        return self._side.end()

    def _enqueue_batch(self, copies: Copies, stream: int) -> None:
        """Enqueue all by one call, which costs least, and small ones follow each other sooner on the device."""
        if copies.number:
            attributes = ctypes.byref(_BatchAttributes(order=_IN_STREAM_ORDER, flags=_BESIDE_KERNELS))
            addresses = (column.ctypes.data for column in copies)
            self._call(_BATCH, *addresses, copies.number, attributes, ctypes.byref(ctypes.c_size_t(0)), 1, stream)

    def _enqueue_each(self, copies: Copies, stream: int, *, may_block: bool) -> None:
        """Enqueue one by one.

        To take the interpreter's lock back after each of hundreds of calls takes longer than they do, so it is kept,
        unless a full stream could block the call: there are many, or the stream waits for a turn.
        """
        memcpy = (self._driver if may_block else self._driver_with_lock).cuMemcpyDtoDAsync_v2
        for copy in copies.rows():
            self._check("cuMemcpyDtoDAsync_v2", memcpy(*copy, stream))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Make PyTorch's context of the device current: a thread that PyTorch has not used yet has none."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _attribute(self, attribute: int, address: int) -> int:
        value = ctypes.c_uint64()
        self._call("cuPointerGetAttribute", ctypes.byref(value), attribute, address)
        return value.value

    def _call(self, function: str, *arguments: object) -> None:
        self._check(function, getattr(self._driver, function)(*arguments))

    def _check(self, function: str, result: int) -> None:
        if result:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(result, ctypes.byref(name))
            raise RuntimeError(f"{function} failed with {(name.value or b'').decode() or result}")
