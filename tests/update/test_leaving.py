"""Leaving an updater while its update runs ends the update at the same layer on all ranks."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from anyio import CancelScope, create_task_group
from anyio.lowlevel import checkpoint
from support.helpers import MemoryRank, assert_same_layer, memory_ranks, together, two_placements

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import ClosedUpdater, UpdateCancelled

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS = 5
TICKS = range(0, 160, 6)

pytestmark = pytest.mark.anyio

Leave = Callable[[int, MemoryRank, ExpertPlacement], Awaitable[None]]


async def update_to_the_end(rank: MemoryRank, new: ExpertPlacement) -> None:
    """Enter, update, leave."""
    async with rank.updater:
        await rank.updater.update(new)


async def leave_everywhere(leave: Leave) -> None:
    """Let one rank leave after each number of ticks; check where all ranks stand."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    seen = set()
    for number, ticks in enumerate(TICKS):
        ranks = memory_ranks(old, TOPOLOGY)
        victim = ranks[number % len(ranks)]
        others = [rank for rank in ranks if rank is not victim]
        first, *rest = await together(
            [
                lambda t=ticks, v=victim: leave(t, v, new),  # type: ignore[misc]
                *(lambda r=other: update_to_the_end(r, new) for other in others),
            ]
        )
        layers = assert_same_layer(ranks, old)
        assert first is None
        assert [isinstance(outcome, UpdateCancelled) for outcome in rest] == [layers < NUM_LAYERS] * len(rest)
        with pytest.raises(ClosedUpdater):
            await victim.updater.update(new)
        seen.add(layers)
    assert {0, NUM_LAYERS} < seen


@pytest.mark.parametrize("way", ["returning", "raising", "cancelled"])
async def test_leaving_while_another_task_updates(way: str) -> None:
    """Whenever and however it comes: same layer everywhere, buffers free, and the other task hears of it."""

    async def leave(ticks: int, rank: MemoryRank, new: ExpertPlacement) -> None:
        outcomes: list[object] = []

        async def update() -> None:
            outcomes.extend(await together([lambda: rank.updater.update(new)]))

        async with create_task_group() as tasks:
            with suppress(ZeroDivisionError), CancelScope() as scope:
                async with rank.updater:
                    tasks.start_soon(update)
                    while rank.updater.running is None:
                        await checkpoint()
                    for _ in range(ticks):
                        await checkpoint()
                    if way == "raising":
                        raise ZeroDivisionError
                    if way == "cancelled":
                        scope.cancel()
            assert rank.updater.running is None
        assert isinstance(outcomes[0], UpdateCancelled) == (rank.updater.placement != new)

    await leave_everywhere(leave)


@pytest.mark.parametrize("times", [1, 2, 3, 6], ids=["once", "twice", "thrice", "again and again"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_task_that_entered_is_cancelled_natively(times: int) -> None:
    """Leaving waits for the end of the update, even if the update's own wait was cut short."""

    async def leave(ticks: int, rank: MemoryRank, new: ExpertPlacement) -> None:
        task = asyncio.ensure_future(update_to_the_end(rank, new))
        while rank.updater.running is None:
            await checkpoint()
        for _ in range(ticks):
            await checkpoint()
        for _ in range(times):
            task.cancel()
            await checkpoint()
        with suppress(asyncio.CancelledError):
            await task
        assert rank.updater.running is None

    await leave_everywhere(leave)
