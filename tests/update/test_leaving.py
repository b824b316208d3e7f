"""Leaving an updater while its update runs ends the update at the same layer on all ranks."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from anyio import CancelScope, create_task_group, sleep
from anyio.lowlevel import checkpoint
from support.helpers import MemoryRank, assert_same_layer, together, with_virtual_time
from support.moments import SlowUpdate

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import ClosedUpdater, UpdateCancelled

NUM_LAYERS = 5
UPDATE = SlowUpdate(EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3), NUM_LAYERS)
_EVERY = 3
"""Of the update's moments, a rank leaves at one in so many."""

pytestmark = pytest.mark.anyio

Leave = Callable[[float, MemoryRank, ExpertPlacement], Awaitable[None]]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


async def update_to_the_end(rank: MemoryRank, new: ExpertPlacement) -> None:
    """Enter, update, leave."""
    async with rank.updater:
        await rank.updater.update(new)


async def leave_everywhere(leave: Leave) -> None:
    """Let one rank leave at several moments of its update; check the layer that each rank ends at."""
    old, new = UPDATE.placements
    seen = set()
    for number, moment in enumerate((await UPDATE.moments())[::_EVERY]):
        ranks = UPDATE.ranks()
        victim = ranks[number % len(ranks)]
        others = [rank for rank in ranks if rank is not victim]
        first, *rest = await together(
            [partial(leave, moment, victim, new), *(partial(update_to_the_end, rank, new) for rank in others)]
        )
        layers = assert_same_layer(ranks, old)
        assert first is None
        assert [isinstance(outcome, UpdateCancelled) for outcome in rest] == [layers < NUM_LAYERS] * len(rest)
        with pytest.raises(ClosedUpdater):
            await victim.updater.update(new)
        seen.add(layers)
    assert {0, NUM_LAYERS} < seen


async def until_updating(rank: MemoryRank) -> None:
    """Wait until an update of a rank runs."""
    while not rank.updater.statistics().updating:
        await checkpoint()


@pytest.mark.parametrize("way", ["returning", "raising", "cancelled"])
async def test_leaving_while_another_task_updates(way: str) -> None:
    """Whenever and however it comes: same layer everywhere, buffers free, and the other task hears of it."""

    async def leave(seconds: float, rank: MemoryRank, new: ExpertPlacement) -> None:
        outcomes: list[object] = []

        async def update() -> None:
            outcomes.extend(await together([partial(rank.updater.update, new)]))

        async with create_task_group() as tasks:
            with suppress(ZeroDivisionError), CancelScope() as scope:
                async with rank.updater:
                    tasks.start_soon(update)
                    await until_updating(rank)
                    await sleep(seconds)
                    if way == "raising":
                        raise ZeroDivisionError
                    if way == "cancelled":
                        scope.cancel()
            assert not rank.updater.statistics().updating
        assert isinstance(outcomes[0], UpdateCancelled) == (rank.updater.placement != new)

    await leave_everywhere(leave)


@pytest.mark.parametrize("times", [1, 2, 6], ids=["once", "twice", "again and again"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_the_task_that_entered_is_cancelled_natively(times: int) -> None:
    """Leaving waits for the end of the update, even if the update's own wait was cut short."""

    async def leave(seconds: float, rank: MemoryRank, new: ExpertPlacement) -> None:
        task = asyncio.ensure_future(update_to_the_end(rank, new))
        await until_updating(rank)
        await sleep(seconds)
        for _ in range(times):
            task.cancel()
            await checkpoint()
        with suppress(asyncio.CancelledError):
            await task
        assert not rank.updater.statistics().updating

    await leave_everywhere(leave)
