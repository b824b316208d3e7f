"""How much the stages overlap: an update with two staging buffers and with one, stages of set durations.

Two ranks in memory update 20 layers on the real clock. A stage's work takes its set time (a sleep) on top of the real
planning, copying and control of both ranks, which share one event loop; one stage takes 40 ms a layer, the other two
24 ms each, a control round 2 ms. Depths alternate, run by run, in one process.

Predicted before the first measurement, for stages of 20 ms and 1 ms of real work a layer: 1.11 times the slowest
stage's total, and 1.6 times as long with depth 1 (1.26 if planning is the slowest, as it then overlaps all the rest).
That run showed 2 ms of real work a layer (1.18 with transfers slowest, 1.13 else). So with 40 ms: 1.12 with transfers
slowest, 1.09 else; depth 1 as before.
"""

import argparse
from contextlib import AsyncExitStack
from statistics import median

import anyio
import numpy as np

from async_eplb import EPTopology, ExpertUpdater, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import MemorySchedule

_STAGES = ("plan", "transfer", "commit")
_TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=6)
_MODEL = SampleModel(hidden=8, intermediate=4)
_NUM_EXPERTS = 8
_FAST_STAGE = 0.6
_CONTROL_ROUND = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--layers", type=int, default=20, help="layers of an update (default: 20)")
    parser.add_argument("--stage-ms", type=float, default=40.0, help="the slowest stage, a layer (default: 40)")
    parser.add_argument("--runs", type=int, default=3, help="updates of each kind; medians are shown (default: 3)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return median times in milliseconds and their ratios, with each stage as the slowest."""
    total_ms = options.layers * options.stage_ms
    figures: dict[str, float] = {}
    for slowest in _STAGES:
        stages_s = {stage: (1.0 if stage == slowest else _FAST_STAGE) * options.stage_ms / 1e3 for stage in _STAGES}
        control_s = _CONTROL_ROUND * options.stage_ms / 1e3
        times_ms: dict[int, list[float]] = {2: [], 1: []}
        for _ in range(options.runs):
            for depth, times in times_ms.items():
                times.append(anyio.run(_update_ms, options.layers, stages_s, control_s, depth))
        overlapped, alone = (median(times) for times in times_ms.values())
        figures |= {
            f"{slowest}_slowest_depth_2_ms": overlapped,
            f"{slowest}_slowest_depth_1_ms": alone,
            f"{slowest}_slowest_depth_1_over_depth_2": alone / overlapped,
            f"{slowest}_slowest_depth_2_over_slowest_stage": overlapped / total_ms,
        }
    return figures


async def _update_ms(num_layers: int, stages_s: dict[str, float], control_s: float, depth: int) -> float:
    """Return what one update takes, in milliseconds."""
    rng = np.random.default_rng(0)
    old, new = (random_placement(rng, num_layers, _TOPOLOGY.num_physical_experts, _NUM_EXPERTS) for _ in range(2))
    schedule = MemorySchedule(exchange_s=stages_s["transfer"], control_s=control_s)
    durations_s = {"plan": stages_s["plan"], "commit": stages_s["commit"]}
    async with AsyncExitStack() as stack:
        updaters = [
            await stack.enter_async_context(
                ExpertUpdater(
                    ExpertWeights(_MODEL.weights(old, _TOPOLOGY, rank)),
                    old,
                    _TOPOLOGY,
                    rank=rank,
                    transport=transport,
                    options=UpdateOptions(staging_depth=depth),
                    workers=ScheduledWorkers(durations_s),
                )
            )
            for rank, transport in enumerate(MemoryTransport.world(_TOPOLOGY.num_ranks, schedule))
        ]
        start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for updater in updaters:
                tasks.start_soon(updater.update, new)
        return (anyio.current_time() - start) * 1e3
