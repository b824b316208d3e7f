"""Cancelling an update at every point of it leaves all ranks at the same layer."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, move_on_after
from anyio.lowlevel import checkpoint
from support.helpers import assert_same_layer, memory_world, on_all, together, two_placements, with_virtual_time

from async_eplb import EPTopology, UpdateOptions
from async_eplb.errors import UpdateCancelled
from async_eplb.plan import Planner
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.workers import ThreadWorkers

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS = 5

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


async def cancelled_after(ticks: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Run ``call``, cancel it after so many turns of the event loop; return whether it had ended before."""
    done = False
    async with create_task_group() as tasks:
        with CancelScope() as scope:

            async def cancel() -> None:
                for _ in range(ticks):
                    await checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            await call()
            done = True
            tasks.cancel_scope.cancel()
    return done


async def natively_cancelled_after(ticks: int, call: Callable[[], Awaitable[object]], *, times: int) -> bool:
    """Do the same with asyncio's own cancellation, as servers that know no anyio do.

    The first turn begins the call: a task that is cancelled before that has never called anything.
    """
    task = asyncio.ensure_future(call())
    for _ in range(1 + ticks):
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def cancel_everywhere(
    cancel: Callable[[int, Callable[[], Awaitable[object]]], Awaitable[bool]],
    launch_rule: LaunchRule = LaunchRule.AT_ONCE,
    topology: EPTopology = TOPOLOGY,
    options: UpdateOptions | None = None,
) -> list[int]:
    """Cancel one rank's update after each number of ticks until it is too late; return the layers committed."""
    old, new = two_placements(topology, NUM_LAYERS, num_experts=6)
    committed, ticks, done = [], 0, False
    while not done:
        schedule = MemorySchedule(seed=ticks, message_jitter_s=0.0, launch_rule=launch_rule)
        async with memory_world(old, topology, schedule=schedule, options=options) as ranks:
            victim = ranks[ticks % len(ranks)].updater
            others = [rank.updater for rank in ranks if rank.updater is not victim]
            outcomes: list[Any] = await together(
                [
                    lambda v=victim, t=ticks: cancel(t, lambda: v.update(new)),  # type: ignore[misc]
                    *(partial(u.update, new) for u in others),
                ]
            )
            done = outcomes[0] is True
            while victim._run is not None:
                await checkpoint()
            layers = assert_same_layer(ranks, old)
            committed.append(layers)
            for outcome in outcomes[1:]:
                assert isinstance(outcome, UpdateCancelled) == (layers < NUM_LAYERS)
            await on_all(ranks, lambda u: u.update(new))
            assert assert_same_layer(ranks, old) == NUM_LAYERS
        ticks += 1
    return committed


async def test_cancelling_at_every_point() -> None:
    """Whenever it comes: same layer everywhere, buffers free, updater usable."""
    committed = await cancel_everywhere(cancelled_after)
    assert len(committed) > 50
    assert set(committed) == set(range(NUM_LAYERS + 1)) - {1}


async def test_cancelling_granted_transfers_at_every_point() -> None:
    """The update can end after any layer, for what was not granted is not under way."""
    committed = await cancel_everywhere(cancelled_after, LaunchRule.GRANTED)
    assert len(committed) > 50
    assert set(committed) == set(range(NUM_LAYERS + 1))


@pytest.mark.parametrize("staging_depth", [2, 3])
async def test_cancelling_relays_at_every_point(staging_depth: int) -> None:
    """A layer whose first hop is under way is passed on before the update ends."""
    options = UpdateOptions(planner=Planner("relayed"), staging_depth=staging_depth)
    committed = await cancel_everywhere(cancelled_after, topology=EPTopology(4, 2, 3), options=options)
    assert len(committed) > 50
    assert {0, staging_depth, NUM_LAYERS} <= set(committed)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "again while it waits for the end"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_cancelling_natively_at_every_point(times: int) -> None:
    """A plain ``task.cancel()`` is no different; a second one ends the wait, not the update."""
    committed = await cancel_everywhere(partial(natively_cancelled_after, times=times))
    assert len(committed) > 50
    assert set(committed) == set(range(NUM_LAYERS + 1)) - {1}


async def test_cancelling_all_ranks_at_once() -> None:
    """When every rank's caller goes away at another time, they still agree."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    for ticks in range(0, 60, 3):
        async with memory_world(old, TOPOLOGY) as ranks:
            await together(
                [
                    lambda u=rank.updater, t=ticks + 7 * i: cancelled_after(t, lambda: u.update(new))  # type: ignore[misc]
                    for i, rank in enumerate(ranks)
                ]
            )
            assert_same_layer(ranks, old)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancelling_while_threads_work(backend: str) -> None:
    """In real time, whatever the threads are at: same layer everywhere, and the updater is usable."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    hours = UpdateOptions(transfer_timeout_s=3600, control_timeout_s=7200, progress_timeout_s=10800)

    async def cancel_after(seconds: float) -> int:
        schedule = MemorySchedule(control_s=0.001)
        async with memory_world(old, TOPOLOGY, schedule=schedule, options=hours, workers=ThreadWorkers) as ranks:
            first, *others = [rank.updater for rank in ranks]

            async def update_first() -> None:
                with move_on_after(seconds):
                    await first.update(new)

            await together([update_first, *(partial(u.update, new) for u in others)])
            layers = assert_same_layer(ranks, old)
            await on_all(ranks, lambda u: u.update(new))
            assert assert_same_layer(ranks, old) == NUM_LAYERS
            return layers

    layers = [anyio.run(cancel_after, seconds, backend=backend) for seconds in (0.002, 0.005, 0.01, 0.02, 0.03, 3600)]
    assert layers[-1] == NUM_LAYERS
