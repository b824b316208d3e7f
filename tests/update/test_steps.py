"""Steps: each passes one boundary, one at a time, and ranks whose counts differ are found."""

from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.helpers import (
    MemoryRank,
    memory_world,
    on_all,
    together,
    two_placements,
    until,
    with_virtual_time,
)

from async_eplb import EPTopology, ExpertUpdater, UpdateOptions
from async_eplb.errors import (
    BusyUpdater,
    SkippedPass,
    StepMismatch,
    UpdateAborted,
)
from async_eplb.transport import MemorySchedule

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS = 6
SCHEDULE = MemorySchedule(control_s=0.001)
"""In virtual time, rounds that took none would follow each other for ever."""

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


async def test_idle_ranks_before_different_boundaries_get_an_error() -> None:
    """A rank that made a step fewer is found out when all are idle."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE) as ranks:
        await ranks[1].updater.step()

        async def stand(updater: ExpertUpdater) -> object:
            async with updater.idle():
                return await updater.begin(new).wait()

        outcomes = await on_all(ranks, stand)
        assert all(isinstance(outcome, StepMismatch) for outcome in outcomes)
        assert {outcome.steps for outcome in outcomes} == {(0, 1, 0)}
        for rank in ranks:
            assert rank.updater.placement == old
            rank.assert_consistent()


async def test_numbers_are_the_engines() -> None:
    """Boundaries count as the engine does, wherever it begins; while no update runs, skipping hurts nobody."""
    old, _ = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE) as ranks:
        updater = ranks[0].updater
        numbers: list[Any] = [41, np.int64(42), torch.tensor(44), np.array(44), np.uint8(43), 45]
        for number, step in zip(numbers, (41, 42, 44, 44, 44, 45), strict=True):
            await updater.step(number)
            assert updater.statistics().step == step
            assert type(updater.statistics().step) is int
        wrong: list[Any] = [0, -1, "46", 46.0, True, torch.tensor([46]), 2**63]
        for number in wrong:
            with pytest.raises(StepMismatch):
                await updater.step(number)


@pytest.mark.parametrize("off_by", [1, -1, -2], ids=["skips", "repeats", "goes back"])
@pytest.mark.parametrize("at", range(1, 6))
async def test_a_rank_that_skips_a_pass_ends_the_update_everywhere(at: int, off_by: int) -> None:
    """Its handle says so, step() does not; layers are the same on all ranks, and the next update works."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE, options=UpdateOptions(lead=1)) as ranks:
        number = 100
        await on_all(ranks, lambda u: u.step(number))
        handles = [rank.updater.begin(new) for rank in ranks]
        await until(lambda: all(rank.updater.outlook.generation == 1 for rank in ranks))
        while not all(handle.done for handle in handles):
            number += 1
            wrong = number + (off_by if number >= 100 + at else 0)
            for rank, each in zip(ranks, (number, number, wrong), strict=True):
                await rank.updater.step(each)
            await anyio.sleep(0.002)
        *others, skipper = await together([handle.wait for handle in handles])
        assert isinstance(skipper, SkippedPass)
        assert skipper.steps == (99 + at, 100 + at + off_by)
        assert all(isinstance(other, UpdateAborted) and other.ranks == (2,) for other in others)
        assert len({rank.updater.placement for rank in ranks}) == 1
        await on_all(ranks, lambda u: u.update(new))
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_step_counts_that_drift_apart_end_the_update() -> None:
    """A rank that does not step is named by all ranks."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE, options=UpdateOptions(max_step_skew=20)) as ranks:
        for _ in range(30):
            await ranks[0].updater.step()
        handles = [rank.updater.begin(new) for rank in ranks]
        outcomes = await together([handle.wait for handle in handles])
        assert all(isinstance(outcome, StepMismatch) for outcome in outcomes)


async def test_two_steps_at_once_are_refused() -> None:
    """The second task gets an error, while the first waits at its fence."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    schedule = MemorySchedule(control_s=0.02)
    async with memory_world(old, TOPOLOGY, schedule=schedule, options=UpdateOptions(lead=1)) as ranks:
        handles = [rank.updater.begin(new) for rank in ranks]
        refused = 0

        async def serve(rank: MemoryRank, handle: Any) -> None:
            nonlocal refused
            while not handle.done:
                try:
                    await rank.updater.step()
                except BusyUpdater:
                    refused += 1
                await anyio.sleep(0.001)

        pairs = list(zip(ranks, handles, strict=True))
        await together([partial(serve, *pair) for pair in [*pairs, pairs[0]]])
        assert refused > 0
        assert ranks[0].updater.placement == new
        waits = [rank.updater.statistics() for rank in ranks]
        assert any(s.num_fence_waits > 0 and s.fence_wait_ms > 0 and s.lead > 1 for s in waits)


async def test_a_step_cancelled_at_its_fence_has_not_passed_it() -> None:
    """The next call passes the same boundary."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    schedule = MemorySchedule(control_s=0.05)
    async with memory_world(old, TOPOLOGY, schedule=schedule, options=UpdateOptions(lead=1)) as ranks:
        handles = [rank.updater.begin(new) for rank in ranks]
        cancelled = 0
        for _ in range(2000):
            for rank in ranks:
                before = rank.updater.statistics().step
                with anyio.move_on_after(0.001) as scope:
                    await rank.updater.step()
                if scope.cancelled_caught:
                    cancelled += 1
                    assert rank.updater.statistics().step == before
                else:
                    assert rank.updater.statistics().step == before + 1
            await anyio.sleep(0.001)
            if all(handle.done for handle in handles):
                break
        assert cancelled > 0
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_idle_steps_are_cheap() -> None:
    """Without an update, a step neither yields to the loop nor rings anybody."""
    old, _ = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE) as ranks:
        with pytest.raises(StopIteration):
            ranks[0].updater.step().send(None)
