"""Sums of loads over ranks, in one event loop and between processes."""

import time
from functools import partial

import anyio
import pytest
import torch
import torch.distributed as dist
from support.helpers import together
from support.loads import MemoryLoadGroup

from async_eplb.errors import BrokenLoadGroup
from async_eplb.load.group import GlooLoadGroup
from async_eplb.load.value import ExpertLoad
from async_eplb.load.window import LoadWindow
from async_eplb.testing import WorldRank, run_world


@pytest.mark.anyio
async def test_ranks_of_one_process_get_their_sum() -> None:
    """Also twice in a row; all get the same."""
    group = MemoryLoadGroup(3)
    windows = [LoadWindow(1, 2, 4) for _ in range(3)]
    for round_ in (1, 2):
        for window in windows:
            window.record(0, torch.tensor([0, 1, 1]))
            window.advance()
        loads = await together([partial(window.gather, group) for window in windows])
        assert loads == [ExpertLoad.from_counts([[3 * round_, 6 * round_]], num_steps=round_)] * 3


def gather_between_processes(world: WorldRank) -> list[list[int]]:
    """Record different tokens on each rank and return the load of all."""

    async def gather() -> ExpertLoad:
        group = await GlooLoadGroup.open(timeout_s=30)
        window = LoadWindow(2, 3, 4)
        window.record(1, torch.full((world.rank + 1,), world.rank))
        window.advance()
        await window.gather(group)
        return await window.gather(group, "decode")

    load = anyio.run(gather)
    assert (load.num_steps, load.phase) == (1, "decode")
    return [[int(tokens) for tokens in row] for row in load.tokens]


def test_processes_get_their_sum() -> None:
    """Over real sockets."""
    assert run_world(gather_between_processes, 3) == [[[0, 0, 0], [1, 2, 3]]] * 3


def gather_without_rank_one(world: WorldRank) -> str:
    """Leave rank 0 alone in a sum."""

    async def gather() -> str:
        group = await GlooLoadGroup.open(timeout_s=2)
        if world.rank == 1:
            return "did not take part"
        try:
            await LoadWindow(1, 1, 1).gather(group)
        except BrokenLoadGroup as error:
            return f"rank {error.rank} noticed"
        return "nobody noticed"

    return anyio.run(gather)


def test_a_rank_that_does_not_take_part_is_noticed() -> None:
    """The others get an error instead of waiting forever."""
    assert run_world(gather_without_rank_one, 2) == ["rank 0 noticed", "did not take part"]


def leave_rank_zero_alone_and_close(world: WorldRank) -> bool:
    """Rank 0 begins a sum that rank 1 does not; both are cancelled. Return whether it ended as a cancelled one."""

    async def end() -> bool:
        group = await GlooLoadGroup.open(timeout_s=60)
        async with anyio.create_task_group() as tasks:
            if world.rank == 0:
                tasks.start_soon(LoadWindow(1, 1, 1).gather, group)
                await anyio.sleep(0.1)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(dist.barrier)
            group.close()
        return tasks.cancel_scope.cancelled_caught

    return anyio.run(end)


def test_a_cancelled_sum_ends_when_the_group_is_closed() -> None:
    """Long before its timeout, and without an error."""
    begun_s = time.monotonic()
    assert run_world(leave_rank_zero_alone_and_close, 2) == [True, False]
    assert time.monotonic() - begun_s < 30
