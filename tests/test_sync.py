"""Synchronous engines: the same updater behind blocking calls."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isfunction, signature
from types import FrameType
from typing import Any, Never

import pytest
from support.helpers import TINY, two_placements
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport
from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.errors import BusyUpdater, ClosedUpdater, UpdateCancelled, WrongEventLoop
from async_eplb.sync import SyncUpdater

TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
OLD, NEW = two_placements(TOPOLOGY, 3, num_experts=4)
LONG_OLD, LONG_NEW = two_placements(TOPOLOGY, 32, num_experts=4)


def new_updater(
    tensors: dict[int, list[Tensor]] | None = None, placement: ExpertPlacement = OLD, **options: Any
) -> SyncUpdater:
    """Make an updater of one rank."""
    weights = ExpertWeights(tensors or TINY.weights(placement, TOPOLOGY, 0))
    return SyncUpdater(weights, placement, TOPOLOGY, rank=0, transport=MemoryTransport.world(1)[0], **options)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_synchronous_engines_use_the_same_updater(backend: str) -> None:
    """One rank in plain threads: all that an updater does works on either event loop."""
    tensors, elsewhere = (TINY.weights(OLD, TOPOLOGY, 0) for _ in range(2))
    with new_updater(tensors, backend=backend) as updater:
        handle = updater.begin(NEW)
        while not handle.done:
            updater.step()
        assert handle.wait().layers == (0, 1, 2)
        with updater.idle():
            updater.begin(OLD).wait()
        with updater.paused():
            assert updater.placement == OLD
            updater.rebind(ExpertWeights(elsewhere))
        assert updater.update(NEW).layers == (0, 1, 2)
        assert [committed.layer for committed in updater.stream(OLD)] == [0, 1, 2]
        assert updater.update(NEW).layers == (0, 1, 2)
        assert updater.audit(MemoryTransport.world(1)[0]).mismatches == ()
    assert TINY.wrong_slots(tensors, OLD, TOPOLOGY, 0) == TINY.wrong_slots(elsewhere, NEW, TOPOLOGY, 0) == []
    assert handle.wait().layers == (0, 1, 2), "also when it was left"


def test_leaving_a_stream_early_cancels_the_update() -> None:
    """After the layers that are under way."""
    with new_updater(placement=LONG_OLD, on_commit=lambda _commit: time.sleep(0.005)) as updater:
        landings = updater.stream(LONG_NEW)
        next(landings)
        landings.close()
        assert updater.statistics().num_updates_failed == 1
        updater.update(LONG_NEW)
        assert updater.placement == LONG_NEW


def test_both_facades_have_the_same_face() -> None:
    """The same parameters, and one more; the same properties; and methods with the same parameters."""
    plain, synchronous = (dict(signature(kind).parameters) for kind in (ExpertUpdater, SyncUpdater))
    assert synchronous.pop("backend").default == "asyncio"
    assert synchronous == plain
    properties = {name for name, value in vars(SyncUpdater).items() if isinstance(value, property)}
    internal = {"running", "failed", "staging", "outlook", "home"}
    assert properties | internal >= {name for name, value in vars(ExpertUpdater).items() if isinstance(value, property)}
    methods = {name for name, value in vars(ExpertUpdater).items() if isfunction(value) and not name.startswith("_")}
    for name in methods - {"step_sync"}:
        of_plain, of_sync = (set(signature(getattr(kind, name)).parameters) for kind in (ExpertUpdater, SyncUpdater))
        assert of_plain - of_sync <= ({"after"} if name in {"begin", "update", "stream"} else set()), name


class RecordingDevice(CpuDevice):
    """A device that tells which thread recorded an event, and which was waited for."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def record(self) -> DeviceEvent:
        """Return an event of this thread."""
        return _Event(self, threading.current_thread().name)

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        """Yield the threads whose events were waited for inside."""
        before = len(self.waited)
        noted: list[str] = []
        yield noted
        noted += self.waited[before:]


class _Event:
    def __init__(self, device: RecordingDevice, thread: str) -> None:
        self._device = device
        self._thread = thread

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._device.waited.append(self._thread)


def test_what_the_calling_thread_wrote_is_on_the_device_before_other_threads_update() -> None:
    """Weights that were loaded before entering, and inside ``paused()``; a rebalancer begins in the loop's thread."""
    device, here = RecordingDevice(), threading.current_thread().name
    with device.noted() as entering:
        updater = new_updater(device=device).__enter__()
    with device.noted() as pausing, updater.paused(after=device.record()):
        pass
    updater.__exit__(None, None, None)
    assert entering[0] == here
    assert pausing[-1] == here


def test_what_is_not_entered_or_was_left_is_closed() -> None:
    """It says so, whatever is called; an updater has one life."""
    updater = new_updater()
    with pytest.raises(ClosedUpdater, match="enter the SyncUpdater first"):
        updater.update(NEW)
    with updater:
        handle = updater.begin(NEW)
        with pytest.raises(BusyUpdater):
            updater.__enter__()
    with pytest.raises(UpdateCancelled):
        handle.wait()
    handle.cancel()
    for call in (lambda: updater.update(NEW), lambda: updater.begin(NEW), updater.idle().__enter__):
        with pytest.raises(ClosedUpdater):
            call()


def test_the_event_loop_cannot_wait_for_itself() -> None:
    """A blocking call in its own thread is refused; another function gets its result from there."""

    async def block() -> str:
        with pytest.raises(WrongEventLoop):
            updater.update(NEW)
        return threading.current_thread().name

    with new_updater() as updater:
        assert updater.call(block) == "eplb-event-loop"
        with pytest.raises(WrongEventLoop):
            updater.updater.begin(NEW)
        assert updater.update(NEW).layers == (0, 1, 2)


def test_an_interrupted_call_is_cancelled() -> None:
    """Ctrl-C while the update waits: nothing goes on without the caller, and the next update begins."""

    def interrupt(_number: int, _frame: FrameType | None) -> Never:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with new_updater(placement=LONG_OLD, on_commit=lambda _commit: time.sleep(0.02)) as updater:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                updater.update(LONG_NEW)
            while updater.statistics().updating:
                time.sleep(0.001)
            assert updater.statistics().num_updates_failed == 1
            assert updater.update(LONG_NEW).layers
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_unknown_event_loop_is_refused() -> None:
    """Entering raises, and leaves nothing running."""
    with pytest.raises(LookupError, match="curio"):
        new_updater(backend="curio").__enter__()
