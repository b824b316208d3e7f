"""What an event costs the thread that emits it, of its processor: nobody listening, shown to observers, as JSON.

Expected: under 10 us when nobody listens, for every event of the steady path, on 320 ranks; a few more for a JSON log.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import structlog
from prometheus_client import CollectorRegistry

from async_eplb.events.emit import Logger, default_logger, emit
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.json_log import JsonLog
from async_eplb.events.metrics import Metrics
from async_eplb.events.schema import Event, FenceWaited, LayerCommitted, LayerPlanned, UpdateFinished, UpdateStarted
from async_eplb.plan import LayerPlan, Recv, Send, SlotSource
from async_eplb.topology import EPTopology
from async_eplb.update.journal import transfer_event

_TOPOLOGY = EPTopology(num_ranks=320, num_nodes=40, num_local_physical_experts=2)
_PLAN = LayerPlan(
    slot_sources=(SlotSource.SAME_NODE, SlotSource.CROSS_NODE),
    local_copies=(),
    recvs=(Recv(3, 1, 0), Recv(9, 77, 1)),
    sends=tuple(Send(5, dst, 0) for dst in (2, 3, 40, 90)),
    fan_outs=(),
)
_ABOUT = {"generation": 1, "rank": 0, "step": 7}

_MAKERS: dict[str, Callable[[], Event]] = {
    "planned": lambda: LayerPlanned(
        **_ABOUT,
        layer=3,
        duration_ms=1.0,
        num_same_gpu=0,
        num_free_rider=0,
        num_same_node=1,
        num_cross_node=1,
        num_sends=4,
    ),
    "transferred": lambda: transfer_event(
        _PLAN, _TOPOLOGY, 0, layer=3, generation=1, step=7, expert_nbytes=44_040_192, ms=1.0
    ),
    "committed": lambda: LayerCommitted(
        **_ABOUT, layer=3, duration_ms=1.0, copy_ms=0.1, wait_ms=2.0, num_slots=2, nbytes=88_080_384
    ),
    "fence_waited": lambda: FenceWaited(**_ABOUT, duration_ms=1.0, lead=2),
    "update_started": lambda: UpdateStarted(
        **_ABOUT,
        mode="serving",
        num_ranks=320,
        num_nodes=40,
        num_layers=58,
        num_unchanged_layers=0,
        staging_nbytes=1 << 30,
    ),
    "update_finished": lambda: UpdateFinished(
        **_ABOUT,
        duration_ms=1.0,
        plan_ms=1.0,
        transfer_ms=1.0,
        wait_ms=1.0,
        commit_ms=1.0,
        overlap=1.0,
        num_layers=58,
        sent_nbytes_within_node=1,
        sent_nbytes_across_nodes=1,
        received_nbytes_within_node=1,
        received_nbytes_across_nodes=1,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--number", type=int, default=2000, help="events of each kind in a run (default: 2000)")
    parser.add_argument("--runs", type=int, default=7, help="runs; the median counts (default: 7)")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Return microseconds to build and emit one event, by listener and kind."""
    figures: dict[str, object] = {}
    logging.getLogger("async_eplb").setLevel(logging.CRITICAL)
    silent = structlog.wrap_logger(
        None, processors=[], wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )
    with tempfile.TemporaryDirectory() as folder, JsonLog(Path(folder) / "log.jsonl", max_waiting=1 << 22) as log:
        listeners: dict[str, Logger] = {
            "nobody": silent,
            "nobody_by_default": default_logger(),
            "metrics": EventLogger(silent, observers=[Metrics(CollectorRegistry())]),
            "json": log.logger(),
        }
        for listener, logger in listeners.items():
            bound = logger.bind(run_id="0123456789abcdef0123456789abcdef")
            costs = {name: _cost_us(bound, make, options) for name, make in _MAKERS.items()}
            figures |= {f"{listener}_{name}_us": cost for name, cost in costs.items()}
            figures[f"{listener}_worst_us"] = max(costs.values())
        figures["json_num_dropped"] = log.num_dropped
    return figures


def _cost_us(logger: Logger, make: Callable[[], Event], options: argparse.Namespace) -> float:
    costs = []
    for _ in range(options.runs):
        start = time.thread_time()
        for _ in range(options.number):
            emit(logger, make())
        costs.append((time.thread_time() - start) / options.number * 1e6)
    return float(median(costs))
