"""Cancelling an update at any moment of it leaves all ranks at the same layer."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import move_on_after
from support.helpers import assert_same_layer, memory_world, on_all, together, two_placements, with_virtual_time
from support.moments import SlowUpdate, until_idle

from async_eplb import EPTopology, ExpertUpdater, UpdateOptions
from async_eplb.errors import UpdateCancelled
from async_eplb.plan import Planner
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.workers import ThreadWorkers

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS = 5
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


async def cancelled_after(seconds: float, call: Callable[[], Awaitable[object]]) -> bool:
    """Run ``call`` and cancel it after so long; return whether it was cancelled."""
    with move_on_after(seconds) as scope:
        await call()
    return scope.cancelled_caught


async def natively_cancelled_after(seconds: float, call: Callable[[], Awaitable[object]], *, times: int) -> bool:
    """Do the same with asyncio's own cancellation, as servers that know no anyio do."""
    task = asyncio.ensure_future(call())
    await asyncio.sleep(seconds)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task])
    return task.cancelled()


async def cancel_everywhere(
    update: SlowUpdate, cancel: Callable[[float, Callable[[], Awaitable[object]]], Awaitable[bool]] = cancelled_after
) -> set[int]:
    """Cancel one rank's update at each of its moments; return the numbers of layers that were committed."""
    old, new = update.placements
    committed = set()
    moments = await update.moments()
    for number, moment in enumerate(moments):
        async with update.world() as ranks:
            victim = ranks[number % len(ranks)]
            others = [rank for rank in ranks if rank is not victim]
            cancelled, *outcomes = await together(
                [
                    partial(cancel, moment, partial(victim.updater.update, new)),
                    *(partial(rank.updater.update, new) for rank in others),
                ]
            )
            assert cancelled or moment > moments[0]
            assert not cancelled or moment < moments[-1]
            await until_idle(victim)
            layers = assert_same_layer(ranks, old)
            committed.add(layers)
            assert [isinstance(outcome, UpdateCancelled) for outcome in outcomes] == [layers < NUM_LAYERS] * len(others)
            await on_all(ranks, ExpertUpdater.update, [new] * len(ranks))
            assert assert_same_layer(ranks, old) == NUM_LAYERS
    return committed


async def test_cancelling_at_every_moment() -> None:
    """Whenever it comes: same layer everywhere, buffers free, updater usable."""
    committed = await cancel_everywhere(SlowUpdate(TOPOLOGY, NUM_LAYERS))
    assert committed > {0, NUM_LAYERS}


@ON_ASYNCIO
async def test_cancelling_granted_transfers_at_every_moment() -> None:
    """The update can end after any layer, for what was not granted is not under way."""
    committed = await cancel_everywhere(SlowUpdate(TOPOLOGY, NUM_LAYERS, LaunchRule.GRANTED))
    assert committed == set(range(NUM_LAYERS + 1))


@ON_ASYNCIO
@pytest.mark.parametrize("staging_depth", [2, 3])
async def test_cancelling_relays_at_every_moment(staging_depth: int) -> None:
    """A layer whose first hop is under way is passed on before the update ends."""
    options = UpdateOptions(planner=Planner("relayed"), staging_depth=staging_depth)
    committed = await cancel_everywhere(SlowUpdate(EPTopology(4, 2, 3), NUM_LAYERS, options=options))
    assert committed >= {0, staging_depth, NUM_LAYERS}


@ON_ASYNCIO
@pytest.mark.parametrize("times", [1, 2], ids=["once", "again while it waits for the end"])
async def test_cancelling_natively_at_every_moment(times: int) -> None:
    """A plain ``task.cancel()`` is no different; a second one ends the wait, not the update."""
    cancel = partial(natively_cancelled_after, times=times)
    committed = await cancel_everywhere(SlowUpdate(TOPOLOGY, NUM_LAYERS), cancel)
    assert committed > {0, NUM_LAYERS}


async def test_cancelling_all_ranks_at_once() -> None:
    """When every rank's caller goes away at another time, they still agree."""
    update = SlowUpdate(TOPOLOGY, NUM_LAYERS)
    old, new = update.placements
    moments = await update.moments()
    for number in range(0, len(moments) - 8, 4):
        async with update.world() as ranks:
            await on_all(
                ranks,
                lambda updater, moment: cancelled_after(moment, partial(updater.update, new)),
                moments[number : number + 9 : 4],
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
