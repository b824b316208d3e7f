"""Updates while the model serves, in a world in memory: every rank switches a layer at the same boundary."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import create_task_group
from support.helpers import (
    MemoryRank,
    memory_ranks,
    memory_world,
    on_all,
    together,
    two_placements,
    with_virtual_time,
)

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, LayerCommit, UpdateOptions
from async_eplb.errors import (
    BusyUpdater,
    UpdateCancelled,
    UpdateNotBegun,
)
from async_eplb.transport import LaunchRule, MemorySchedule

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS = 6
SCHEDULE = MemorySchedule(control_s=0.001)
"""In virtual time, rounds that took none would follow each other for ever."""

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


class Server:
    """One rank that makes forward passes: a step boundary, then a barrier with the other ranks, as collectives are."""

    def __init__(self, rank: MemoryRank, seed: int) -> None:
        self.rank = rank
        self.updater = rank.updater
        self.random = random.Random(seed)
        self.commits: dict[int, int] = {}
        self.stop = False

    def note_commit(self, commit: LayerCommit) -> None:
        """Remember the boundary of a layer's commit."""
        self.commits[commit.layer] = self.updater.statistics().step
        assert commit.step == self.commits[commit.layer]

    async def serve(self) -> None:
        """Step at random speed until ``stop`` is set."""
        while not self.stop:
            await self.updater.step()
            await anyio.sleep(self.random.uniform(0.0, 0.004))


@asynccontextmanager
async def serving_world(
    old: ExpertPlacement, *, seed: int = 0, schedule: MemorySchedule = SCHEDULE, **options: Any
) -> AsyncIterator[list[Server]]:
    """Open a world whose ranks step until the block ends."""
    servers: list[Server] = []

    def note(rank: int, commit: LayerCommit) -> None:
        servers[rank].note_commit(commit)

    hooks = [partial(note, i) for i in range(3)]
    async with memory_world(
        old, TOPOLOGY, schedule=schedule, options=UpdateOptions(**options), on_commit=hooks
    ) as ranks:
        servers += [Server(rank, seed + i) for i, rank in enumerate(ranks)]
        async with create_task_group() as tasks:
            for server in servers:
                tasks.start_soon(server.serve)
            yield servers
            for server in servers:
                server.stop = True


async def begin_everywhere(servers: list[Server], new: ExpertPlacement) -> list[Any]:
    """Begin on each rank at another time; return what waiting for it gave."""

    async def begin(server: Server) -> object:
        await anyio.sleep(server.random.uniform(0.0, 0.03))
        return await server.updater.begin(new).wait()

    return await together([partial(begin, server) for server in servers])


@pytest.mark.parametrize("launch_rule", LaunchRule)
@pytest.mark.parametrize("lead", [1, 4])
@pytest.mark.parametrize("depth", [1, 3])
async def test_every_rank_switches_a_layer_at_the_same_boundary(launch_rule: LaunchRule, lead: int, depth: int) -> None:
    """Over several updates, layers land in order, everywhere at the same step, and the weights are right."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    schedule = replace(SCHEDULE, launch_rule=launch_rule)
    async with serving_world(old, schedule=schedule, lead=lead, staging_depth=depth, verify="checksum") as servers:
        for target in (new, old, new):
            outcomes = await begin_everywhere(servers, target)
            assert all(outcome.layers == tuple(range(NUM_LAYERS)) for outcome in outcomes)
            assert servers[0].commits == servers[1].commits == servers[2].commits
            boundaries = list(servers[0].commits.values())
            assert boundaries == sorted(boundaries)
            for server in servers:
                server.rank.assert_consistent()
                assert server.updater.placement == target


async def test_committed_events_name_the_boundary() -> None:
    """The step in the log is the boundary that the layer was committed at."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with serving_world(old) as servers:
        await begin_everywhere(servers, new)
        statistics = servers[0].updater.statistics()
        assert statistics.num_layers_committed == NUM_LAYERS
        assert statistics.num_updates_finished == 1
        assert statistics.step >= max(servers[0].commits.values()) >= 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("launch_rule", LaunchRule)
async def test_cancelling_a_handle_ends_the_update_at_the_same_layer(launch_rule: LaunchRule) -> None:
    """At whatever time one rank cancels, all ranks end alike and can go on."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    schedule = replace(SCHEDULE, launch_rule=launch_rule, exchange_s=0.002)
    ends = set()
    number, ended = 0, False
    while not ended:
        async with serving_world(old, seed=number, schedule=schedule, lead=1) as servers:
            handles = [server.updater.begin(new) for server in servers]
            await anyio.sleep(number * 0.0023)
            ended = all(handle.done for handle in handles)
            handles[number % 3].cancel()
            outcomes = await together([handle.wait for handle in handles])
            layers = {len(server.commits) for server in servers}
            assert len(layers) == 1
            ends |= layers
            assert servers[0].commits == servers[1].commits == servers[2].commits
            for server, outcome in zip(servers, outcomes, strict=True):
                server.rank.assert_consistent()
                assert isinstance(outcome, UpdateCancelled) == (layers != {NUM_LAYERS})
            assert all(not isinstance(o, Exception) for o in await begin_everywhere(servers, new))
        number += 1
    assert len(ends) > 2


async def test_an_update_ends_without_steps_while_all_ranks_are_idle() -> None:
    """Idle ranks before the same boundary commit there at once, and have not passed it."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE) as ranks:

        async def stand(updater: ExpertUpdater) -> object:
            await updater.step()
            async with updater.idle():
                return await updater.begin(new).wait()

        await on_all(ranks, stand)
        for rank in ranks:
            assert rank.updater.placement == new
            assert rank.updater.statistics().step == 1
            rank.assert_consistent()
            await rank.updater.step()


async def test_pausing_drains() -> None:
    """Inside paused() no update runs and none begins; afterwards it can."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE) as ranks:
        handles = [rank.updater.begin(new) for rank in ranks]

        async def pause(updater: ExpertUpdater) -> None:
            async with updater.paused():
                assert updater.placement == new
                with pytest.raises(BusyUpdater, match="paused"):
                    updater.begin(old)
                with pytest.raises(BusyUpdater, match="paused"):
                    await updater.step()

        outcomes = await on_all(ranks, pause)
        assert outcomes == [None] * 3
        assert all(handle.done for handle in handles)
        await on_all(ranks, lambda u: u.update(old))
        assert ranks[0].updater.placement == old


async def test_a_handle_may_be_awaited_again() -> None:
    """A cancelled wait is repeated, a finished one returns the same."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    async with serving_world(old) as servers:
        handles = [server.updater.begin(new) for server in servers]
        with anyio.move_on_after(0):
            await handles[0].wait()
        outcomes = await together([handle.wait for handle in handles])
        assert await handles[0].wait() == outcomes[0]


async def test_a_hook_that_fails_is_raised_by_the_step_and_ends_the_update_alike() -> None:
    """The layer is committed everywhere all the same."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)

    def fail(commit: LayerCommit) -> None:
        if commit.layer == 2:
            raise ZeroDivisionError

    hooks: list[Callable[[LayerCommit], None]] = [fail, lambda _: None, lambda _: None]
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE, on_commit=hooks) as ranks:
        handles = [rank.updater.begin(new) for rank in ranks]
        raised = []

        async def serve(updater: ExpertUpdater, handle: Any) -> None:
            while not handle.done:
                try:
                    await updater.step()
                except ZeroDivisionError as error:
                    raised.append(error)
                await anyio.sleep(0.001)

        await on_all(ranks, serve, handles)
        assert len(raised) == 1
        assert len({rank.updater.placement for rank in ranks}) == 1
        handles = [rank.updater.begin(old) for rank in ranks]
        await on_all(ranks, serve, handles)
        for rank in ranks:
            rank.assert_consistent()
            assert rank.updater.placement == old


async def test_a_rank_that_never_begins_is_named() -> None:
    """Nothing was moved, and who began knows for whom it waited."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)
    options = UpdateOptions(transfer_timeout_s=0.05, control_timeout_s=0.2)
    async with memory_world(old, TOPOLOGY, schedule=SCHEDULE, options=options) as ranks:
        outcomes = await on_all(ranks[:2], lambda u: u.begin(new).wait())
        assert all(isinstance(outcome, UpdateNotBegun) and outcome.ranks == (2,) for outcome in outcomes)
        for rank in ranks:
            assert rank.updater.placement == old
            await rank.updater.step()


async def test_leaving_while_an_update_runs_ends_it_at_the_same_layer() -> None:
    """Ranks that leave, each after another number of steps, still commit what was agreed."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=6)

    async def live(updater: ExpertUpdater, steps: int) -> None:
        async with updater:
            updater.begin(new)
            for _ in range(steps):
                await updater.step()
                await anyio.sleep(0.001)

    ends = set()
    for steps in range(0, 60, 6):
        ranks = memory_ranks(old, TOPOLOGY, schedule=SCHEDULE)
        assert await on_all(ranks, live, range(steps, steps + 3)) == [None] * 3
        (placement,) = {rank.updater.placement for rank in ranks}
        ends.add(len(placement.changed_layers(old)))
        for rank in ranks:
            rank.assert_consistent()
    assert len(ends) > 2
