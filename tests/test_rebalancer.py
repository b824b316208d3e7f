"""The background task, in a world in memory whose ranks serve."""

import math
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn
from unittest.mock import ANY

import anyio
import numpy as np
import pytest
import structlog
import torch
from anyio import create_task_group
from anyio.abc import TaskStatus
from structlog.testing import LogCapture
from support.helpers import MemoryRank, memory_ranks, memory_world, together
from support.loads import MemoryLoadGroup

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.device import CpuDevice
from async_eplb.errors import (
    BusyUpdater,
    ClosedRebalancer,
    InvalidOptions,
    InvalidPolicyOutput,
    PlacementDisagreement,
    RebalanceFailed,
)
from async_eplb.load.source import LoadSnapshot, LoadSource
from async_eplb.load.value import ExpertLoad
from async_eplb.load.window import LoadWindow
from async_eplb.policy import Global, Incremental, PlacementPolicy, Reason, RebalanceTerms
from async_eplb.rebalancer import RebalanceOptions, Rebalancer

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
NUM_LAYERS, NUM_EXPERTS = 4, 6
OLD = ExpertPlacement.trivial(NUM_LAYERS, 9, NUM_EXPERTS)
TERMS = RebalanceTerms(expert_nbytes=100, link_bytes_per_s=1e9, layer_step_s=1e-3, horizon_steps=1000)

pytestmark = pytest.mark.anyio


REBALANCE_FINISHED: dict[str, Any] = {
    "event": "eplb.rebalance.finished",
    "log_level": "info",
    "schema_version": 1,
    "run_id": ANY,
    "monotonic_s": ANY,
    "wall_s": ANY,
    "generation": 1,
    "rank": 0,
    "layer": None,
    "step": ANY,
    "number": 1,
    "duration_ms": ANY,
    "moved": True,
    "num_layers": 4,
    "balancedness_before": pytest.approx(4 / 9),
    "balancedness_after": ANY,
}


class OwnCounters:
    """An engine's own counts, ``[layers, logical]``; notes whether they were read inside a step."""

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.inside_step: list[bool] = []

    def snapshot(self, phase: str | None = None) -> LoadSnapshot:
        """Return tokens of one hot expert."""
        self.inside_step.append(self.server.inside_step)
        counts = torch.ones(1, NUM_LAYERS, NUM_EXPERTS + 1, dtype=torch.int64)
        counts[..., self.server.hot] = 7
        counts[..., -1] = 0
        return LoadSnapshot(counts, CpuDevice().record(), num_steps=2, phase=phase)


class Server:
    """One rank: it steps, records tokens for a hot expert, and has a rebalancer."""

    def __init__(self, rank: MemoryRank, group: MemoryLoadGroup, policy: PlacementPolicy, **options: Any) -> None:
        self.updater = rank.updater
        self.rank = rank
        self.window = LoadWindow(NUM_LAYERS, NUM_EXPERTS, window_steps=8)
        self.log = LogCapture()
        self.group, self.policy = group, policy
        self.rebalancer = self.rebalancer_of(self.window, **options)
        self.last_step = math.inf
        self.hot = 4
        self.inside_step = False

    def rebalancer_of(self, source: LoadSource, **options: Any) -> Rebalancer:
        """Return a rebalancer of this rank; it is not started."""
        return Rebalancer(
            self.updater,
            source,
            self.policy,
            group=self.group,
            terms=TERMS,
            options=RebalanceOptions(**options),
            logger=structlog.wrap_logger(None, processors=[self.log]),
        )

    async def serve(self) -> None:
        """Make forward passes until the last one, or until cancelled."""
        while self.updater.statistics().step < self.last_step:
            self.inside_step = True
            await self.updater.step()
            self.inside_step = False
            for layer in range(NUM_LAYERS):
                self.window.record(layer, torch.tensor([0, 1, 2, 3, 4, 5] + [self.hot] * 6))
            self.window.advance()
            await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def servers(*policies: PlacementPolicy, **options: Any) -> AsyncIterator[list[Server]]:
    """Open ranks that serve; rebalancers are not started."""
    group = MemoryLoadGroup(3)
    async with memory_world(OLD, TOPOLOGY) as ranks:
        chosen = policies or (Global(),) * 3
        world = [Server(rank, group, policy, **options) for rank, policy in zip(ranks, chosen, strict=True)]
        async with create_task_group() as tasks:
            for server in world:
                tasks.start_soon(server.serve)
            yield world
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def rebalancing(world: list[Server]) -> AsyncIterator[None]:
    """Run all rebalancers inside."""
    async with create_task_group() as tasks:
        for server in world:
            await tasks.start(server.rebalancer.run)
        yield
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("demanding", "run_policy_in"),
    [([1], "thread"), ([0, 1, 2], "thread"), ([1], "process")],
    ids=["by one rank", "by all ranks", "by one rank, the policy in a process"],
)
async def test_a_demand_rebalances_all_ranks(demanding: list[int], run_policy_in: str) -> None:
    """Every rank moves to the same better placement, while it serves."""
    async with servers(every_steps=None, run_policy_in=run_policy_in) as world, rebalancing(world):
        await anyio.sleep(0.01)
        outcomes = await together([world[rank].rebalancer.rebalance_now for rank in demanding])
        for outcome in outcomes:
            assert outcome.number == 1
            assert outcome.decision.reason is Reason.PAYS
            assert outcome.summary.layers == tuple(range(NUM_LAYERS))
            assert min(outcome.decision.balancedness_after) > max(outcome.decision.balancedness_before)
        while any(server.rebalancer.statistics().num_moved < 1 for server in world):
            await anyio.lowlevel.checkpoint()
        assert len({server.updater.placement for server in world}) == 1
        for server in world:
            server.rank.assert_consistent()


async def test_a_rebalance_ends_well_whatever_its_logger_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events that it did not take are in the statistics."""

    def raise_error(*_arguments: object) -> NoReturn:
        raise RuntimeError("deaf")

    monkeypatch.setattr(LogCapture, "__call__", raise_error)
    async with servers(every_steps=None) as world, rebalancing(world):
        outcome = await world[1].rebalancer.rebalance_now()
        assert outcome.decision.reason is Reason.PAYS
        assert world[1].rebalancer.statistics().num_events_lost == 2


async def test_an_engine_may_count_by_itself() -> None:
    """Its counts are read once for each rebalance, inside a step."""
    async with servers(every_steps=None) as world:
        sources = [OwnCounters(server) for server in world]
        for server, source in zip(world, sources, strict=True):
            server.rebalancer = server.rebalancer_of(source, every_steps=None)
        async with rebalancing(world):
            outcome = await world[1].rebalancer.rebalance_now()
            while any(server.rebalancer.statistics().num_moved < 1 for server in world):
                await anyio.lowlevel.checkpoint()
        assert outcome.load == ExpertLoad.from_counts([[3, 3, 3, 3, 21, 3]] * NUM_LAYERS, num_steps=2)
        assert [source.inside_step for source in sources] == [[True]] * 3


async def test_ranks_that_stand_rebalance_too() -> None:
    """Loads are read beside, and the update ends although nobody steps."""
    async with servers(every_steps=None) as world:
        for server in world:
            server.last_step = 20
        while any(server.updater.statistics().step < 20 for server in world):
            await anyio.lowlevel.checkpoint()
        async with AsyncExitStack() as stack:
            for server in world:
                await stack.enter_async_context(server.updater.idle())
            async with rebalancing(world):
                outcome = await world[2].rebalancer.rebalance_now()
                while any(server.rebalancer.statistics().num_moved < 1 for server in world):
                    await anyio.lowlevel.checkpoint()
        assert outcome.summary is not None
        assert outcome.decision.reason is Reason.PAYS


async def test_a_rebalance_waits_for_the_end_of_a_pause() -> None:
    """Its policy ends inside the pause, in which no update can begin; afterwards it does."""
    async with servers(every_steps=None) as world:
        for server in world:
            server.last_step = 20
        while any(server.updater.statistics().step < 20 for server in world):
            await anyio.lowlevel.checkpoint()
        async with rebalancing(world), create_task_group() as tasks:
            async with AsyncExitStack() as pauses:
                for server in world:
                    await pauses.enter_async_context(server.updater.paused())
                tasks.start_soon(world[2].rebalancer.rebalance_now)
                while not all(server.log.entries for server in world):
                    await anyio.lowlevel.checkpoint()
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                assert all(server.rebalancer.statistics().running for server in world)
                assert all(server.updater.running is None for server in world)
            async with AsyncExitStack() as stack:
                for server in world:
                    await stack.enter_async_context(server.updater.idle())
                while any(server.rebalancer.statistics().num_moved < 1 for server in world):
                    await anyio.lowlevel.checkpoint()


async def test_a_rebalance_is_logged_completely() -> None:
    """The costs, the gain and the outcome."""
    async with servers(every_steps=None) as world, rebalancing(world):
        await anyio.sleep(0.01)
        outcome = await world[0].rebalancer.rebalance_now()
        evaluated, finished = world[0].log.entries
        expected = outcome.decision.event(generation=0, rank=0, step=evaluated["step"], policy=Global())
        stamps = {"schema_version": 1, "run_id": ANY, "monotonic_s": ANY, "wall_s": ANY}
        assert evaluated == {"event": expected.name, "log_level": "info", **stamps, **asdict(expected)}
        assert finished == REBALANCE_FINISHED
        assert evaluated["mean_balancedness_after"] == finished["balancedness_after"] > 0.8


async def test_rebalances_come_every_so_many_steps() -> None:
    """When the hot expert changes, the placement follows by itself."""
    async with servers(every_steps=30) as world, rebalancing(world):
        rebalancer = world[0].rebalancer
        for num_moves, hot in enumerate((4, 1), start=1):
            for server in world:
                server.hot = hot
            while rebalancer.statistics().num_moved < num_moves:
                await anyio.lowlevel.checkpoint()
        while world[0].updater.placement.replica_counts()[:, 1].min() < 3:
            await anyio.lowlevel.checkpoint()
        assert rebalancer.statistics().num_rebalances >= 2


async def test_what_is_balanced_stays() -> None:
    """The second evaluation moves nothing and gives the reason."""
    async with servers(every_steps=None) as world, rebalancing(world):
        await anyio.sleep(0.01)
        first = await world[0].rebalancer.rebalance_now()
        second = await world[0].rebalancer.rebalance_now()
        assert first.summary is not None
        assert second.summary is None
        assert second.decision.reason in (Reason.BALANCED, Reason.NO_GAIN)
        assert world[0].rebalancer.statistics().num_moved == 1


async def test_a_cool_down_keeps_rebalances_apart() -> None:
    """A demand right after a rebalance waits for so many steps."""
    async with servers(every_steps=None, cool_down_steps=50) as world, rebalancing(world):
        await world[0].rebalancer.rebalance_now()
        before = world[0].updater.statistics().step
        await world[0].rebalancer.rebalance_now()
        assert world[0].updater.statistics().step >= before + 50


async def test_pacing_spreads_an_update_over_steps() -> None:
    """With so many bytes for each step, the update takes at least that many steps."""

    async def steps_of_an_update(**options: Any) -> tuple[int, int]:
        async with servers(every_steps=None, **options) as world, rebalancing(world):
            await anyio.sleep(0.01)
            before = world[0].updater.statistics().step
            outcome = await world[0].rebalancer.rebalance_now()
            assert outcome.summary is not None
            summary = outcome.summary
            received = summary.received_nbytes_within_node
            return world[0].updater.statistics().step - before, received

    _, received = await steps_of_an_update()
    steps, _ = await steps_of_an_update(max_nbytes_per_step=4)
    assert steps >= received / 4 * (NUM_LAYERS - 1) / NUM_LAYERS


@dataclass(frozen=True)
class Broken:
    """A policy that leaves experts out."""

    def __call__(self, _load: ExpertLoad, current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
        return ExpertPlacement.from_mapping(np.zeros_like(current.physical_to_logical_map), NUM_EXPERTS)


@dataclass(frozen=True)
class Fixed:
    """A policy that always wants the same."""

    placement: ExpertPlacement

    def __call__(self, _load: ExpertLoad, _current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
        return self.placement


async def failures_of(world: list[Server]) -> list[list[Exception]]:
    """Demand a rebalance on rank 0; return what each rebalancer raised."""
    failures: list[list[Exception]] = [[] for _ in world]

    async def run(index: int, *, task_status: Any) -> None:
        try:
            await world[index].rebalancer.run(task_status=task_status)
        except Exception as error:  # noqa: BLE001 - an outcome like any other
            failures[index].append(error)

    async with create_task_group() as tasks:
        for index in range(len(world)):
            await tasks.start(run, index)
        with pytest.raises(RebalanceFailed) as caught:
            await world[0].rebalancer.rebalance_now()
        assert caught.value.number == 1
    return failures


async def test_an_invalid_policy_is_raised_on_every_rank() -> None:
    """It reaches the owner of the task group and who demanded it; nothing was moved."""
    async with servers(Broken(), Broken(), Broken(), every_steps=None) as world:
        for (error,) in await failures_of(world):
            assert isinstance(error, InvalidPolicyOutput)
        assert {server.updater.placement for server in world} == {OLD}


async def test_ranks_that_choose_differently_are_named() -> None:
    """A policy that is not the same everywhere is found out before a byte moves."""
    better = ExpertPlacement.from_mapping([[4, 0, 1, 4, 2, 3, 4, 5, 4]] * NUM_LAYERS, NUM_EXPERTS)
    odd = ExpertPlacement.from_mapping([[4, 0, 1, 4, 3, 2, 4, 5, 4]] * NUM_LAYERS, NUM_EXPERTS)
    async with servers(Fixed(better), Fixed(odd), Fixed(better), every_steps=None) as world:
        for (error,) in await failures_of(world):
            assert isinstance(error, PlacementDisagreement)
            assert error.ranks == (1,)
        assert {server.updater.placement for server in world} == {OLD}


async def test_use_outside_its_run_is_refused() -> None:
    """A demand needs a running task, and there is one."""
    async with servers(every_steps=None) as world:
        rebalancer = world[0].rebalancer
        with pytest.raises(ClosedRebalancer):
            await rebalancer.rebalance_now()
        async with rebalancing(world):
            with pytest.raises(BusyUpdater):
                await rebalancer.run()
        assert not rebalancer.statistics().running


async def test_a_demand_that_is_not_met_any_more_raises() -> None:
    """When the rebalancer's task is cancelled, a call that waits for a rebalance raises."""
    async with servers(every_steps=None, cool_down_steps=10**9) as world:

        async def demand(*, task_status: TaskStatus[None]) -> None:
            task_status.started()
            with pytest.raises(ClosedRebalancer):
                await world[0].rebalancer.rebalance_now()

        async with create_task_group() as tasks, rebalancing(world):
            await world[0].rebalancer.rebalance_now()
            await tasks.start(demand)


@pytest.mark.parametrize(
    "options", [{"every_steps": 0}, {"cool_down_steps": -1}, {"max_nbytes_per_step": 0}, {"run_policy_in": "loop"}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """The error names the option."""
    with pytest.raises(InvalidOptions, match=next(iter(options))):
        RebalanceOptions(**options)


@dataclass(frozen=True)
class Locked:
    """A policy of a module that cannot be sent to another process."""

    lock: Any

    def __call__(self, _load: ExpertLoad, current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
        return current


def policies_that_stay() -> dict[str, PlacementPolicy]:
    """Return policies that no other process can be given."""

    def inner(_load: ExpertLoad, current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
        return current

    @dataclass(frozen=True)
    class Inner:
        def __call__(self, _load: ExpertLoad, current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
            return current

    return {
        "a lambda": lambda _load, current, _topology: current,
        "a function inside of a function": inner,
        "a class inside of a function": Inner(),
        "a lambda in a policy": Incremental(objective=lambda load: load),
        "a lock in a policy": Locked(threading.Lock()),
        "a lambda in a partial": partial(lambda _kept, _load, current, _topology: current, 0),
    }


@pytest.mark.parametrize("name", policies_that_stay())
def test_a_policy_that_cannot_be_sent_to_a_process_is_refused_when_given(name: str) -> None:
    """In a thread it may be whatever can be called."""
    policy = policies_that_stay()[name]
    rank = memory_ranks(OLD, TOPOLOGY)[0]
    arguments: dict[str, Any] = {"group": MemoryLoadGroup(1), "terms": TERMS}
    window = LoadWindow(NUM_LAYERS, NUM_EXPERTS, window_steps=8)
    with pytest.raises(InvalidOptions, match="cannot be sent") as caught:
        Rebalancer(rank.updater, window, policy, options=RebalanceOptions(run_policy_in="process"), **arguments)
    assert caught.value.option == "run_policy_in"
    Rebalancer(rank.updater, window, policy, **arguments)
