"""How long a report takes: a made log of many ranks, layers and updates, read by a process that has one core.

Expected: 320 ranks x 58 layers x 20 updates (371,200 events of each layer kind) in 10 s and 1 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from async_eplb.events.emit import stamped
from async_eplb.events.schema import (
    Event,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
    UpdateFinished,
    UpdateStarted,
)

_EXPERT_NBYTES = 44_040_192
_RANKS_PER_NODE = 8

_READ = """
import json, os, resource, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
start = time.perf_counter()
from async_eplb.report import read_events, summarize
log = read_events(sys.argv[1])
read = time.perf_counter()
report = summarize(log)
end = time.perf_counter()
print(json.dumps({
    "report_s": end - start, "report_cpu_s": time.process_time(), "read_s": read - start, "summarize_s": end - read,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    "num_updates": len(report.updates),
    "received_nbytes": sum(u.received_nbytes_within_node + u.received_nbytes_across_nodes for u in report.updates),
}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--ranks", type=int, default=320, help="EP ranks (default: 320)")
    parser.add_argument("--layers", type=int, default=58, help="layers (default: 58)")
    parser.add_argument("--updates", type=int, default=20, help="updates (default: 20)")
    parser.add_argument("--log-dir", type=Path, help="keep the log there")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Make the log, and read it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log_dir = options.log_dir or Path(folder)
        log_dir.mkdir(parents=True, exist_ok=True)
        num_events, nbytes = make_log(log_dir, options.ranks, options.layers, options.updates)
        output = subprocess.run(  # noqa: S603 - this program
            [sys.executable, "-c", _READ, log_dir], check=True, capture_output=True, text=True, env=_one_core()
        ).stdout
        figures: dict[str, object] = json.loads(output)
        adds_up = figures.pop("received_nbytes") == nbytes
        size = sum(path.stat().st_size for path in log_dir.iterdir())
    return {
        "num_events": num_events,
        "log_mb": size / 1e6,
        **figures,
        "bytes_add_up": adds_up,
    }


def make_log(log_dir: Path, num_ranks: int, num_layers: int, num_updates: int) -> tuple[int, int]:
    """Write one file for each rank, as if each received one expert for each layer; return events and bytes."""
    rng = np.random.default_rng(0)
    shape = (num_updates, num_layers, num_ranks)
    sources = (np.arange(num_ranks) + rng.integers(1, max(num_ranks, 2), size=(*shape[:2], 1))) % num_ranks
    times = rng.gamma(4.0, 1.0, size=(*shape, 3))
    start, wall = time.monotonic(), time.time()
    num_events = 0
    for rank in range(num_ranks):
        with (log_dir / f"rank-{rank}.jsonl").open("w") as file:
            for event, at_s in _events(rank, num_ranks, sources, times):
                values = {"event": event.name, "run_id": "made", **stamped(event)}
                values |= {"monotonic_s": start + at_s, "wall_s": wall + at_s}
                file.write(json.dumps(values) + "\n")
                num_events += 1
    return num_events, int(np.prod(shape)) * _EXPERT_NBYTES


def _events(rank: int, num_ranks: int, sources: np.ndarray, times: np.ndarray) -> Iterator[tuple[Event, float]]:
    num_updates, num_layers, _ = sources.shape
    num_nodes = max(num_ranks // _RANKS_PER_NODE, 1)
    for update in range(num_updates):
        about: dict[str, Any] = {"generation": update + 1, "rank": rank}
        begun = update * 10.0
        yield (
            UpdateStarted(
                **about,
                step=0,
                mode="serving",
                num_ranks=num_ranks,
                num_nodes=num_nodes,
                num_layers=num_layers,
                num_unchanged_layers=0,
                staging_nbytes=2 * _EXPERT_NBYTES,
            ),
            begun,
        )
        totals = [0, 0]
        for layer in range(num_layers):
            plan_ms, transfer_ms, commit_ms = times[update, layer, rank].tolist()
            here = {**about, "layer": layer, "step": update * 1000 + layer * 4 + 4}
            src = int(sources[update, layer, rank])
            dst = int(np.flatnonzero(sources[update, layer] == rank)[0])
            at_s = begun + (layer + 1) * 0.02
            sent, received = ((peer, peer // _RANKS_PER_NODE == rank // _RANKS_PER_NODE) for peer in (dst, src))
            totals[received[1]] += _EXPERT_NBYTES
            yield (
                LayerPlanned(
                    **here,
                    duration_ms=plan_ms,
                    num_same_gpu=0,
                    num_free_rider=0,
                    num_same_node=int(received[1]),
                    num_cross_node=int(not received[1]),
                    num_sends=1,
                ),
                at_s,
            )
            yield LayerTransferred(**here, duration_ms=transfer_ms, **_bytes(sent, received, num_nodes)), at_s + 0.004
            yield (
                LayerCommitted(
                    **here,
                    duration_ms=commit_ms / 10,
                    copy_ms=0.03,
                    wait_ms=2.0,
                    num_slots=1,
                    nbytes=_EXPERT_NBYTES,
                ),
                at_s + 0.006,
            )
        yield (
            UpdateFinished(
                **about,
                step=update * 1000 + num_layers * 4 + 4,
                duration_ms=num_layers * 20.0,
                plan_ms=4.0 * num_layers,
                transfer_ms=4.0 * num_layers,
                wait_ms=2.0 * num_layers,
                commit_ms=0.4 * num_layers,
                overlap=0.42,
                num_layers=num_layers,
                sent_nbytes_within_node=totals[1],
                sent_nbytes_across_nodes=totals[0],
                received_nbytes_within_node=totals[1],
                received_nbytes_across_nodes=totals[0],
            ),
            begun + num_layers * 0.02,
        )


def _bytes(sent: tuple[int, bool], received: tuple[int, bool], num_nodes: int) -> dict[str, Any]:
    by_node = [0] * num_nodes
    values: dict[str, Any] = {"copied_nbytes": 0}
    for direction, preposition, (peer, near) in (("sent", "to", sent), ("received", "from", received)):
        nodes = list(by_node)
        nodes[peer // _RANKS_PER_NODE] = _EXPERT_NBYTES
        values |= {
            f"{direction}_nbytes": _EXPERT_NBYTES,
            f"{direction}_{preposition}_ranks": [peer],
            f"{direction}_nbytes_by_rank": [_EXPERT_NBYTES],
            f"{direction}_nbytes_by_node": nodes,
            f"{direction}_nbytes_within_node": _EXPERT_NBYTES * near,
            f"{direction}_nbytes_across_nodes": _EXPERT_NBYTES * (not near),
        }
    return values


def _one_core() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
