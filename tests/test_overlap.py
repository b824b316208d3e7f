"""The stages overlap: an update takes as long as its slowest stage."""

import pytest
import trio
import trio.testing
from helpers import memory_world, together, two_placements

from async_eplb import EPTopology, UpdateOptions
from async_eplb.testing import ScheduledWorkers
from async_eplb.transport import LaunchRule, MemorySchedule

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=6)
NUM_LAYERS = 20


async def duration_s(stages_s: dict[str, float], depth: int, launch_rule: LaunchRule = LaunchRule.AT_ONCE) -> float:
    """Return what an update of 20 layers takes on the virtual clock; ``"exchange"`` is what their messages take."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=8)
    durations = stages_s.copy()
    schedule = MemorySchedule(exchange_s=durations.pop("exchange"), control_s=0.02, launch_rule=launch_rule)
    options = UpdateOptions(staging_depth=depth)
    async with memory_world(
        old, TOPOLOGY, schedule=schedule, options=options, workers=lambda: ScheduledWorkers(durations)
    ) as ranks:
        start = trio.current_time()
        await together([lambda u=rank.updater: u.update(new) for rank in ranks])  # type: ignore[misc]
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
