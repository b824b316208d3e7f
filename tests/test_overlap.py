"""The stages overlap: an update takes as long as its slowest stage."""

import pytest
import trio
import trio.testing
from helpers import memory_world, together, two_placements

from async_eplb import EPTopology, UpdateOptions
from async_eplb.testing import ScheduledWorkers
from async_eplb.transport import MemorySchedule

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=6)
NUM_LAYERS = 20


async def duration_s(stages_s: dict[str, float], depth: int) -> float:
    """Return what an update of 20 layers takes on the virtual clock."""
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=8)
    schedule = MemorySchedule(exchange_s=stages_s["transfer"], control_s=0.02)
    durations = {"plan": stages_s["plan"], "commit": stages_s["commit"]}
    options = UpdateOptions(staging_depth=depth)
    async with memory_world(
        old, TOPOLOGY, schedule=schedule, options=options, workers=lambda: ScheduledWorkers(durations)
    ) as ranks:
        start = trio.current_time()
        await together([lambda u=rank.updater: u.update(new) for rank in ranks])  # type: ignore[misc]
        assert ranks[0].updater.placement == new
        return trio.current_time() - start


@pytest.mark.parametrize("slowest", ["plan", "transfer", "commit"])
def test_an_update_takes_as_long_as_its_slowest_stage(slowest: str) -> None:
    """20 layers take at most 1.15 times the slowest stage's total, and visibly longer without a second buffer."""
    stages_s = {"plan": 0.6, "transfer": 0.6, "commit": 0.6, slowest: 1.0}

    def run(depth: int) -> float:
        return trio.run(duration_s, stages_s, depth, clock=trio.testing.MockClock(autojump_threshold=0))

    overlapped, alone = run(2), run(1)
    assert 1.0 <= overlapped / (NUM_LAYERS * 1.0) <= 1.15
    assert alone > 1.3 * overlapped if slowest != "plan" else alone > overlapped
