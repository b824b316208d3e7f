"""What is called at a boundary: on which thread, behind what, and when nobody steps."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio import create_task_group, to_thread
from support.helpers import TINY, in_virtual_time

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport
from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.errors import ClosedUpdater
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.update.calls import PATIENCE_S
from async_eplb.workers import ThreadWorkers, Workers

TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=2)
PLACEMENT = ExpertPlacement.trivial(1, 2, 2)

pytestmark = pytest.mark.anyio


class WatchedDevice(CpuDevice):
    """Keeps the events that its streams were made to wait for."""

    def __init__(self) -> None:
        self.waited_for: list[DeviceEvent] = []

    def wait(self, event: DeviceEvent) -> None:
        """Keep the event."""
        self.waited_for.append(event)


@asynccontextmanager
async def opened(workers: Workers | None = None, device: CpuDevice | None = None) -> AsyncIterator[ExpertUpdater]:
    """Open an updater of a rank alone."""
    (transport,) = MemoryTransport.world(1)
    weights = ExpertWeights(TINY.weights(PLACEMENT, TOPOLOGY, 0))
    async with ExpertUpdater(
        weights,
        PLACEMENT,
        TOPOLOGY,
        rank=0,
        transport=transport,
        workers=workers or ScheduledWorkers(),
        device=device,
    ) as updater:
        yield updater


async def test_a_call_is_made_inside_the_step_of_the_serving_thread() -> None:
    """On its thread, whichever thread the event loop has; and not before."""
    async with opened(ThreadWorkers()) as updater, create_task_group() as tasks:
        callers = []

        async def call() -> None:
            callers.append(await updater.calls.at_boundary(threading.get_ident))

        tasks.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        assert callers == []

        def serve() -> int:
            updater.step_sync()
            return threading.get_ident()

        serving = await to_thread.run_sync(serve)
        while not callers:
            await anyio.lowlevel.checkpoint()
        assert callers == [serving]


async def test_several_calls_share_a_boundary() -> None:
    """In the order in which they were wanted, each once."""
    async with opened() as updater:
        order: list[int] = []
        async with create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(updater.calls.at_boundary, lambda number=number: order.append(number))
                await anyio.wait_all_tasks_blocked()
            await updater.step()
            assert order == [0, 1, 2]
        await updater.step()
        assert order == [0, 1, 2]


async def test_what_a_call_raises_does_not_reach_the_forward_pass() -> None:
    """Whoever wanted the call gets it; the step and its later calls go on."""

    def fail() -> None:
        raise OSError("no counts")

    async with opened() as updater:
        made: list[bool] = []

        async def want_both() -> None:
            with pytest.raises(OSError, match="no counts"):
                await updater.calls.at_boundary(fail)

        async with create_task_group() as tasks:
            tasks.start_soon(want_both)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(updater.calls.at_boundary, lambda: made.append(True))
            await anyio.wait_all_tasks_blocked()
            await updater.step()
        assert made == [True]
        assert updater.statistics().step == 1


@pytest.mark.parametrize("reason", ["idle", "paused"])
async def test_a_rank_that_stands_is_called_beside(reason: str) -> None:
    """Behind the model's last work, at once; also when it was wanted before."""
    device = WatchedDevice()
    async with opened(device=device) as updater:
        after, called = device.record(), []

        async def call() -> None:
            called.append(await updater.calls.at_boundary(lambda: list(device.waited_for)))

        async with create_task_group() as tasks:
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            async with getattr(updater, reason)(after=after):
                while not called:
                    await anyio.lowlevel.checkpoint()
                await call()
        assert [events[-1] for events in called] == [after, after]


@in_virtual_time
async def test_a_rank_that_makes_no_steps_is_called_all_the_same() -> None:
    """When none has come for so long; its last work is not known then."""
    device = WatchedDevice()
    async with opened(device=device) as updater:
        await updater.step()
        begun_s, before = anyio.current_time(), list(device.waited_for)
        assert await updater.calls.at_boundary(lambda: list(device.waited_for)) == before
        assert anyio.current_time() - begun_s == pytest.approx(PATIENCE_S, abs=0.1)


async def test_a_call_that_was_given_up_is_not_made() -> None:
    """By a cancellation."""
    async with opened() as updater:
        made: list[bool] = []
        async with create_task_group() as tasks:
            tasks.start_soon(updater.calls.at_boundary, lambda: made.append(True))
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await updater.step()
        assert made == []


@in_virtual_time
async def test_leaving_ends_a_call() -> None:
    """No step follows; whoever waits is told at once."""
    made: list[bool] = []

    async def call(updater: ExpertUpdater) -> None:
        with pytest.raises(ClosedUpdater):
            await updater.calls.at_boundary(lambda: made.append(True))

    async with create_task_group() as tasks, opened() as updater:
        begun_s = anyio.current_time()
        tasks.start_soon(call, updater)
        await anyio.wait_all_tasks_blocked()
    await call(updater)
    assert anyio.current_time() - begun_s < PATIENCE_S / 2
    assert made == []
