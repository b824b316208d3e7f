"""Logs to report on: of real processes, and of ranks in memory that serve."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import anyio

from async_eplb import EPTopology, ExpertUpdater, UpdateOptions
from async_eplb.cli import main
from async_eplb.events.emit import emit
from async_eplb.events.json_log import JsonLog
from async_eplb.events.schema import RebalanceEvaluated, RebalanceFinished
from async_eplb.transport import MemorySchedule
from support.helpers import memory_world, on_all, two_placements

SERVING = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
NUM_LAYERS = 3

DROPPED: dict[str, Any] = {
    "event": "eplb.log.dropped",
    "schema_version": 1,
    "run_id": "some run",
    "monotonic_s": ANY,
    "wall_s": ANY,
    "generation": 1,
    "rank": 3,
    "layer": None,
    "step": 1,
    "num_events": 2,
    "error": "[Errno 28] No space left on device",
}


PASSES: dict[str, Any] = {
    "event": "eplb.passes.timed",
    "schema_version": 1,
    "run_id": ANY,
    "monotonic_s": ANY,
    "wall_s": ANY,
    "generation": 0,
    "rank": 0,
    "layer": None,
    "step": 5,
    "beside": "nothing",
    "num_passes": 4,
    "num_pauses": 0,
    "mean_ms": 437.5,
    "p50_ms": 250.0,
    "p99_ms": 1000.0,
    "max_ms": 1000.0,
    "times_ms": [250.0, 1000.0],
    "num_passes_by_time": [3, 1],
}


def log_of_processes(folder: Path) -> Path:
    """Log what the demo's eight processes do to the published placement."""
    assert main(["demo", "--backend", "gloo", "--log-dir", str(folder)]) == 0
    return folder


def log_of_serving(folder: Path, num_updates: int = 2) -> Path:
    """Log updates of ranks that serve, there and back again, each with a rebalance's decision before it."""
    old, new = two_placements(SERVING, NUM_LAYERS, 6)
    folder.mkdir(exist_ok=True)
    logs = [JsonLog(folder / f"rank-{rank}.jsonl") for rank in range(SERVING.num_ranks)]

    async def serve() -> None:
        loggers = [log.logger() for log in logs]
        options = UpdateOptions(lead=1)
        schedule = MemorySchedule(control_s=0.002, exchange_s=0.002)
        async with memory_world(old, SERVING, schedule=schedule, options=options, loggers=loggers) as ranks:
            for _ in range(3):
                await on_all(ranks, ExpertUpdater.step)
            for number in range(num_updates):
                target = old if number % 2 else new
                handles = []
                for rank in ranks:
                    logger = loggers[rank.updater.rank].bind(run_id=rank.updater.run_id)
                    evaluated = replace(_EVALUATED, generation=number, rank=rank.updater.rank)
                    emit(logger, evaluated)
                    handles.append(rank.updater.begin(target))
                while not all(handle.done for handle in handles):
                    await on_all(ranks, ExpertUpdater.step)
                    await anyio.sleep(0.001)
                for rank, handle in zip(ranks, handles, strict=True):
                    await handle.wait()
                    logger = loggers[rank.updater.rank].bind(run_id=rank.updater.run_id)
                    emit(logger, replace(_FINISHED, generation=number + 1, rank=rank.updater.rank, number=number + 1))

    anyio.run(serve)
    for log in logs:
        log.close()
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change each event of a log."""
    for path in folder.glob("*.jsonl"):
        events = map(json.loads, path.read_text().splitlines())
        path.write_text("".join(json.dumps(change(event)) + "\n" for event in events))


def events_of(paths: Iterable[Path], name: str) -> list[dict[str, Any]]:
    """Return the events of one name, read without the report."""
    events = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [event for event in events if event["event"] == name]


_EVALUATED = RebalanceEvaluated(
    generation=0,
    rank=0,
    step=0,
    policy="made",
    pays=True,
    reason="pays",
    num_layers=NUM_LAYERS,
    num_changed_layers=NUM_LAYERS,
    mean_balancedness_before=0.5,
    mean_balancedness_after=0.875,
    min_balancedness_before=0.25,
    min_balancedness_after=0.75,
    num_receives=8,
    num_slots=36,
    received_nbytes=1632,
    transfer_ms=1.0,
    saved_ms_per_step=0.5,
    horizon_steps=1000,
)
_FINISHED = RebalanceFinished(
    generation=1,
    rank=0,
    step=0,
    number=1,
    duration_ms=10.0,
    moved=True,
    num_layers=NUM_LAYERS,
    balancedness_before=0.5,
    balancedness_after=0.875,
)
