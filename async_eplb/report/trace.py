"""A trace of all ranks in the Trace Event format: for Perfetto and chrome://tracing.

A process is a rank, a thread is a stage; readers want thread numbers that no other process has. Flow arrows lead from a
sender's transfer of a layer to the receiver's. Layers wait for their commit at the same time, so waits are asynchronous
events.

Format: "Trace Event Format", Google, 2016 (the Chromium project's document).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from async_eplb.events.stages import TRANSFER, WAIT, Stage
from async_eplb.report.intervals import TRACKS, Intervals, stage_intervals
from async_eplb.report.runs import Run

_RANKS_PER_RUN = 1 << 16


def write_trace(updates: list[tuple[Run, int]], path: Path) -> None:
    """Write a trace of updates, all on the time lines of their runs."""
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, event in enumerate(trace_events(updates)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")


def trace_events(updates: list[tuple[Run, int]]) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace: names of tracks, then slices, waits and flows of each update.

    :param updates: run and generation of each; runs follow one another as processes of their own
    """
    runs = list({id(run): run for run, _ in updates}.values())
    flow_id = 0
    for number, run in enumerate(runs):
        first_pid = number * _RANKS_PER_RUN + 1
        yield from _names(run, first_pid, many=len(runs) > 1)
        mine = [(generation, stage_intervals(run, generation)) for each, generation in updates if each is run]
        origin_s = min(float(each.starts_s.min()) for _, intervals in mine for each in intervals.values() if len(each))
        for generation, intervals in mine:
            for stage in TRACKS:
                slices = _waits if stage is WAIT else _slices
                yield from slices(intervals[stage.name], stage, generation, first_pid, origin_s)
            for start, end in _flows(run, generation, intervals[TRANSFER.name], first_pid, origin_s):
                flow_id += 1
                yield {**start, "id": flow_id}
                yield {**end, "id": flow_id}


def _names(run: Run, first_pid: int, *, many: bool) -> Iterator[dict[str, Any]]:
    nodes = run.node_of(np.arange(run.num_ranks))
    for rank in range(run.num_ranks):
        name = f"rank {rank} (node {nodes[rank]})" + (f" of {run.run_id[:8]}" if many else "")
        pid = first_pid + rank
        about = {"ph": "M", "pid": pid, "tid": _tid(pid, TRACKS[0])}
        yield {**about, "name": "process_name", "args": {"name": name}}
        yield {**about, "name": "process_sort_index", "args": {"sort_index": pid}}
        for index, stage in enumerate(TRACKS):
            track = {**about, "tid": _tid(pid, stage)}
            yield {**track, "name": "thread_name", "args": {"name": stage.name}}
            yield {**track, "name": "thread_sort_index", "args": {"sort_index": index}}


def _slices(
    intervals: Intervals, stage: Stage, generation: int, first_pid: int, origin_s: float
) -> Iterator[dict[str, Any]]:
    starts, ends = _us(intervals.starts_s - origin_s), _us(intervals.ends_s - origin_s)
    for rank, layer, start, end in zip(intervals.ranks, intervals.layers, starts, ends, strict=True):
        pid = first_pid + int(rank)
        yield {
            "ph": "X",
            "pid": pid,
            "tid": _tid(pid, stage),
            "ts": float(start),
            "dur": round(float(end - start), 3),
            "cat": stage.name,
            "name": f"{stage.name} {layer}",
            "args": {"update": generation, stage.counted_by: int(layer)},
        }


def _waits(
    intervals: Intervals, stage: Stage, generation: int, first_pid: int, origin_s: float
) -> Iterator[dict[str, Any]]:
    starts, ends = _us(intervals.starts_s - origin_s), _us(intervals.ends_s - origin_s)
    for rank, layer, start, end in zip(intervals.ranks, intervals.layers, starts, ends, strict=True):
        pid = first_pid + int(rank)
        about = {
            "pid": pid,
            "tid": _tid(pid, stage),
            "cat": stage.name,
            "name": f"{stage.name} {layer}",
            "id2": {"local": f"{generation}.{layer}"},
            "args": {"update": generation, "layer": int(layer)},
        }
        yield {**about, "ph": "b", "ts": float(start)}
        yield {**about, "ph": "e", "ts": float(end)}


def _flows(
    run: Run, generation: int, transfers: Intervals, first_pid: int, origin_s: float
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield an arrow for each link of each layer, from inside the sender's slice to inside the receiver's."""
    starts, ends = _us(transfers.starts_s - origin_s), _us(transfers.ends_s - origin_s)
    keys = zip(transfers.ranks.tolist(), transfers.layers.tolist(), strict=True)
    slices = {key: (float(start), float(end)) for key, start, end in zip(keys, starts, ends, strict=True)}
    links = run.links("received", generation)
    for src, dst, layer, nbytes in zip(
        *(links[name].tolist() for name in ("peer", "rank", "layer", "nbytes")), strict=True
    ):
        sender, receiver = slices.get((src, layer)), slices.get((dst, layer))
        if sender is None or receiver is None or sender[0] >= receiver[1]:
            continue  # the sender's log is missing, or clocks are too far apart for an arrow forward in time
        about = {
            "cat": "flow",
            "name": "expert weights",
            "args": {"nbytes": nbytes, "layer": layer, "from": src, "to": dst},
        }
        here, there = ({"pid": pid, "tid": _tid(pid, TRANSFER)} for pid in (first_pid + src, first_pid + dst))
        yield (
            {**about, **here, "ph": "s", "ts": sender[0]},
            {**about, **there, "ph": "f", "bp": "e", "ts": receiver[1]},
        )


def _tid(pid: int, stage: Stage) -> int:
    return pid * len(TRACKS) + TRACKS.index(stage)


def _us(seconds: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.asarray(np.round(np.maximum(seconds, 0.0) * 1e6, 3))
