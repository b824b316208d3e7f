"""A report as one page of HTML that works from disk: data, style and script are inside."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from async_eplb.events.stages import FENCE, STAGES, Stage
from async_eplb.report.intervals import FROM_BELOW, MAX_LANES, stage_intervals
from async_eplb.report.rankings import layer_reports
from async_eplb.report.records import Report
from async_eplb.report.runs import Run

MAX_INTERVALS = 400_000
"""Intervals in a page; those of the latest updates go in. One takes about 20 bytes."""


def write_page(runs: list[Run], report: Report, path: Path) -> None:
    """Write the page of a report.

    :param runs: the runs that the report was made of
    """
    document = json.dumps(page_data(runs, report), allow_nan=False, separators=(",", ":"))
    parts = {"STYLE": _part("page.css"), "SCRIPT": _part("page.js"), "DATA": document.replace("<", "\\u003c")}
    page = _part("page.html")
    for name, content in parts.items():
        page = page.replace(f"/*{name}*/", content)
    path.write_text(page)


def page_data(runs: list[Run], report: Report) -> dict[str, Any]:
    """Return the data that the page's script draws, as values of JSON."""
    plain = report.to_json()
    numbers = {run.run_id: number for number, run in enumerate(runs)}
    updates = [{**update, "run": numbers[update["run_id"]]} for update in plain["updates"]]
    return {
        "stages": [_plain(stage) for stage in STAGES],
        "fence": _plain(FENCE),
        "from_below": [_plain(stage) for stage in FROM_BELOW],
        "max_lanes": MAX_LANES,
        "updates": updates,
        "intervals": _latest_intervals(runs, updates),
        "traffic": [_traffic(run) for run in runs],
        "layers": [{"run_id": run.run_id, **asdict(layer)} for run in runs for layer in layer_reports(run)],
        "links": plain["slowest_links"],
        "ranks": plain["lagging_ranks"],
        **{name: plain[name] for name in ("rebalances", "faults", "left_out", "clock_error_ms")},
    }


def _plain(stage: Stage) -> dict[str, str]:
    return {name: getattr(stage, name) for name in ("name", "label", "colour", "total")}


def _latest_intervals(runs: list[Run], updates: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    room = MAX_INTERVALS
    found: list[dict[str, Any] | None] = []
    for update in reversed(updates):
        intervals = stage_intervals(runs[update["run"]], update["generation"])
        number = sum(map(len, intervals.values()))
        room -= number
        if not number or room < 0:
            found.append(None)
            continue
        start_s = min(float(each.starts_s.min()) for each in intervals.values() if len(each))
        drawn: dict[str, Any] = {
            stage: {
                "rank": each.ranks.tolist(),
                "layer": each.layers.tolist(),
                "start": np.round((each.starts_s - start_s) * 1e3, 3).tolist(),
                "end": np.round((each.ends_s - start_s) * 1e3, 3).tolist(),
            }
            for stage, each in intervals.items()
        }
        length_s = max(float(each.ends_s.max()) for each in intervals.values() if len(each)) - start_s
        found.append({**drawn, "length_ms": length_s * 1e3})
    return found[::-1]


def _traffic(run: Run) -> dict[str, Any]:
    traffic = run.traffic()
    cells = [[int(src), int(dst), int(traffic.nbytes[src, dst])] for src, dst in np.argwhere(traffic.nbytes)]
    return {"ranks": run.num_ranks, "nodes": run.num_nodes, "cells": cells}


def _part(name: str) -> str:
    return files("async_eplb.report.page").joinpath(name).read_text()
