"""The order of work on a device: all code that uses streams and events.

The current stream is a property of a thread. So the context managers here are entered only in synchronous code,
which the workers run in threads of their own; nothing is awaited inside them (rule 6 of docs/design.md).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.errors import InvalidWeights
from async_eplb.modes import outside_modes

_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 1e-3
_LOOKS = 12


class DeviceEvent(Protocol):
    """A recorded point in the work of a stream."""

    def query(self) -> bool:
        """Whether the device has passed this point."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the device has passed this point."""
        ...


class Device(Protocol):
    """The device that live weights are on, with a stream for transfers and one for commits."""

    torch_device: torch.device

    def transferring(self) -> AbstractContextManager[None]:
        """Make the transfer stream current in this thread."""
        ...

    def committing(self) -> AbstractContextManager[None]:
        """Make the commit stream current in this thread."""
        ...

    def record(self) -> DeviceEvent:
        """Record an event on the current stream of this thread."""
        ...

    def wait(self, event: DeviceEvent) -> None:
        """Make later work of the current stream wait for a recorded event, without blocking this thread."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised device memory as uint8 ``[nbytes]``."""
        ...

    def allocate_host(self, nbytes: int) -> Tensor:
        """Return uninitialised host memory that the device copies from and to by itself: uint8 ``[nbytes]``."""
        ...


class _Passed:
    """An event that has passed, as all work of a CPU has when the call returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class CpuDevice:
    """The CPU, on which all work is done when the call returns."""

    torch_device = torch.device("cpu")

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """Do nothing: copies on the CPU are done when they return."""
        yield

    committing = transferring

    def record(self) -> DeviceEvent:
        """Return an event that has passed."""
        return _Passed()

    def wait(self, event: DeviceEvent) -> None:
        """Do nothing: the event has passed."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory as uint8 ``[nbytes]``."""
        return _uninitialised(nbytes, CpuDevice.torch_device)

    def allocate_host(self, nbytes: int) -> Tensor:
        """Return uninitialised memory as uint8 ``[nbytes]``."""
        return _uninitialised(nbytes, CpuDevice.torch_device)


class CudaDevice:
    """One CUDA device, with a stream for transfers and one for commits; the default stream is never used.

    The constructor makes both streams, so that all updates use the same ones: the allocator reuses memory only on the
    stream that it was allocated on.
    """

    def __init__(self, torch_device: torch.device) -> None:
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        self._transfer_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._commit_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """Make the transfer stream and its device current in this thread."""
        with torch.cuda.stream(self._transfer_stream):
            yield

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Make the commit stream and its device current in this thread."""
        with torch.cuda.stream(self._commit_stream):
            yield

    def record(self) -> DeviceEvent:
        """Record an event on the current stream of this thread; waiting for it blocks without spinning."""
        return _recorded(torch.cuda.current_stream(self.torch_device))

    def wait(self, event: DeviceEvent) -> None:
        """Make later work of the current stream wait for the event."""
        if not isinstance(event, torch.cuda.Event):
            raise TypeError(f"{event!r} is not an event of a CUDA device")
        torch.cuda.current_stream(self.torch_device).wait_event(event)

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised device memory as uint8 ``[nbytes]``."""
        return _uninitialised(nbytes, self.torch_device)

    def allocate_host(self, nbytes: int) -> Tensor:
        """Return uninitialised pinned memory as uint8 ``[nbytes]``. Can wait for all work of the device."""
        return _uninitialised(nbytes, CpuDevice.torch_device, pinned=True)


def _uninitialised(nbytes: int, torch_device: torch.device, *, pinned: bool = False) -> Tensor:
    with outside_modes():
        return torch.empty(nbytes, dtype=torch.uint8, device=torch_device, pin_memory=pinned)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Rule 4: an event is recorded before anybody has it, for a wait on an unrecorded one does nothing.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class SideStream:
    """A stream beside the current one of a CUDA device, which does not wait for it."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device
        self._stream = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[int]:
        """Make the side stream current, after all that the current stream has so far; yield its handle."""
        self._stream.wait_stream(torch.cuda.current_stream(self._torch_device))
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream

    def end(self) -> DeviceEvent:
        """Record an event after all that the side stream has so far."""
        return _recorded(self._stream)


def record_on(torch_device: torch.device) -> DeviceEvent:
    """Record an event on the current stream that this thread has on a device; one of a CPU has passed."""
    return _recorded(torch.cuda.current_stream(torch_device)) if torch_device.type == "cuda" else _Passed()


def until_passed(event: DeviceEvent, deadline: float) -> None:
    """Block until the device has passed an event, or until a deadline, which CUDA's own wait does not have.

    Queries the event after pauses that grow with the time that has passed: soon for short work, seldom for long work.

    :raises TimeoutError: at the deadline, on the clock of time.monotonic()
    """
    start = time.monotonic()
    while not event.query():
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError("the device is still working")
        time.sleep(min(max((now - start) / _LOOKS, _SHORTEST_NAP_S), _LONGEST_NAP_S))


def device_for(torch_device: torch.device) -> Device:
    """Return the :class:`Device` of a torch device.

    :raises InvalidWeights: for kinds other than ``cpu`` and ``cuda``
    """
    if torch_device.type == "cpu":
        return CpuDevice()
    if torch_device.type == "cuda":
        return CudaDevice(torch_device)
    raise InvalidWeights(f"weights are on {torch_device}; expert weights can be moved on cpu and cuda")
