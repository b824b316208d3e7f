"""The stages overlap: an update takes as long as its slowest stage."""

import pytest
import trio
import trio.testing
from support.helpers import memory_world, on_all, two_placements

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.plan import Planner
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import LaunchRule, MemorySchedule

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=6)
NUM_LAYERS = 20


TWO_NODES = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=2)
RELAYED = tuple(
    ExpertPlacement.from_mapping([row] * NUM_LAYERS) for row in ([0, 1, 2, 3, 0, 1, 4, 5], [0, 1, 4, 3, 2, 4, 2, 5])
)
"""Expert 2 goes from the first node to both ranks of the second."""


async def duration_s(
    stages_s: dict[str, float],
    depth: int,
    launch_rule: LaunchRule = LaunchRule.AT_ONCE,
    topology: EPTopology = TOPOLOGY,
    planner: Planner = Planner(),  # noqa: B008 - it is immutable
) -> float:
    """Return what an update of 20 layers takes on the virtual clock.

    :param stages_s: ``"exchange"`` is what a layer's messages take, ``"relay"`` what its second hop takes
    """
    old, new = RELAYED if planner.relays else two_placements(topology, NUM_LAYERS, num_experts=8)
    durations = stages_s.copy()
    exchange_s, relay_s = durations.pop("exchange"), durations.pop("relay", 0.0)
    schedule = MemorySchedule(exchange_s=exchange_s, relay_s=relay_s, control_s=0.02, launch_rule=launch_rule)
    options = UpdateOptions(staging_depth=depth, planner=planner)
    async with memory_world(
        old, topology, schedule=schedule, options=options, workers=lambda: ScheduledWorkers(durations)
    ) as ranks:
        start = trio.current_time()
        summaries = await on_all(ranks, lambda u: u.update(new))
        assert all(summary.transfer_ms <= summary.duration_ms for summary in summaries), "a time was counted twice"
        assert ranks[0].updater.placement == new
        return trio.current_time() - start


@pytest.mark.parametrize("slowest", ["plan", "exchange", "commit"])
def test_an_update_takes_as_long_as_its_slowest_stage(slowest: str) -> None:
    """20 layers take at most 1.15 times the slowest stage's total, and visibly longer without a second buffer."""
    stages_s = {"plan": 0.6, "exchange": 0.6, "commit": 0.6, slowest: 1.0}

    def run(depth: int) -> float:
        return trio.run(duration_s, stages_s, depth, clock=trio.testing.MockClock(autojump_threshold=0))

    overlapped, alone = run(2), run(1)
    assert 1.0 <= overlapped / (NUM_LAYERS * 1.0) <= 1.15
    assert alone > 1.3 * overlapped if slowest != "plan" else alone > overlapped


@pytest.mark.parametrize("launch_rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED])
def test_a_layer_is_loaded_while_the_one_before_is_received(launch_rule: LaunchRule) -> None:
    """Own slots are copied, and peers are granted the layer, behind the messages of the layer before."""
    stages_s = {"transfer": 0.6, "exchange": 1.0}
    took_s = trio.run(duration_s, stages_s, 2, launch_rule, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 1.0 <= took_s / (NUM_LAYERS * 1.0) <= 1.15


@pytest.mark.parametrize(("first_s", "second_s"), [(1.0, 0.4), (1.0, 1.0), (0.4, 1.0)])
def test_a_layer_is_passed_on_while_the_next_one_crosses(first_s: float, second_s: float) -> None:
    """Of all hops but one at either end only the slower counts, once there is a third buffer."""
    stages_s = {"exchange": first_s, "relay": second_s, "commit": 0.3}

    def run(depth: int) -> float:
        arguments = (stages_s, depth, LaunchRule.AT_ONCE, TWO_NODES, Planner("relayed"))
        return trio.run(duration_s, *arguments, clock=trio.testing.MockClock(autojump_threshold=0))

    overlapped_s = NUM_LAYERS * max(first_s, second_s) + min(first_s, second_s)
    assert overlapped_s <= run(3) <= overlapped_s + 0.5
    assert run(2) > overlapped_s + 0.5 if first_s == second_s else run(2) <= overlapped_s + 0.5
