"""Columns of events → a report of each update."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.passes import percentiles
from async_eplb.events.schema import (
    LINK_NBYTES,
    FenceWaited,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
    LogDropped,
    PassesTimed,
    RebalanceEvaluated,
    RebalanceFinished,
    UpdateFailed,
    UpdateFinished,
    UpdateStarted,
)
from async_eplb.events.stages import STAGES
from async_eplb.report.columns import Table
from async_eplb.report.rankings import lagging_ranks, slowest_layers, slowest_links
from async_eplb.report.reading import EventLog
from async_eplb.report.records import RebalanceReport, Report, UpdateReport
from async_eplb.report.runs import Run, runs_of


def summarize(log: EventLog, *, num_slowest: int = 10) -> Report:
    """Return the report of a log.

    :param num_slowest: number of layers, of links and of ranks that are listed
    """
    runs = runs_of(log)
    updates = [update for run in runs for update in _updates(run)]
    return Report(
        updates=tuple(updates),
        rebalances=tuple(each for run in runs for each in _rebalances(run)),
        slowest_layers=slowest_layers(runs, num_slowest),
        slowest_links=slowest_links(runs, num_slowest),
        lagging_ranks=lagging_ranks(runs, num_slowest),
        faults=tuple(fault for run in runs for fault in _faults(run)),
        left_out=tuple(map(str, log.left_out)),
        clock_error_ms=max(run.clocks.error_s for run in runs) * 1e3,
    )


def _updates(run: Run) -> Iterator[UpdateReport]:
    for generation in run.generations:
        names = (UpdateStarted.name, LayerTransferred.name, LayerCommitted.name, UpdateFinished.name, UpdateFailed.name)
        if any(len(run.events(name, generation)["rank"]) for name in names):
            yield _update(run, generation)


def _update(run: Run, generation: int) -> UpdateReport:
    started, finished, failed = (
        run.events(name, generation) for name in (UpdateStarted.name, UpdateFinished.name, UpdateFailed.name)
    )
    planned, moved, committed = (
        run.events(name, generation) for name in (LayerPlanned.name, LayerTransferred.name, LayerCommitted.name)
    )
    fences = run.events(FenceWaited.name, generation)
    stalls = _stalls(committed, fences)
    p50, p99, worst = np.percentile(stalls, [50, 99, 100]) if len(stalls) else [math.nan] * 3
    outcome = "failed" if len(failed["rank"]) else "finished" if len(finished["rank"]) else "unfinished"
    ends = failed if outcome == "failed" else finished
    start_s, duration_ms = _extent((planned, moved, committed, ends))
    layers = np.unique(np.concatenate([planned["layer"], committed["layer"]]))
    num_layers = int(started["num_layers"].max(initial=0)) or len(layers)
    num_unchanged = int(started["num_unchanged_layers"].max(initial=0))
    skipped = np.setdiff1d(np.arange(num_layers + num_unchanged), layers)
    times: dict[str, Any] = {
        stage.total: _slowest_rank(run.events(stage.event.name, generation), stage.duration) for stage in STAGES
    }
    beside, others = _passes(run, "update", generation), _passes(run, "nothing")
    beside_p50, beside_p99, beside_max = percentiles(*beside, (50, 99, 100))
    others_p50, others_p99 = percentiles(*others, (50, 99))
    balance, saved = _balance(run, generation), _saved(run, generation)
    return UpdateReport(
        run_id=run.run_id,
        generation=generation,
        mode=str(started["mode"][0]) if len(started["mode"]) else "unknown",
        outcome=outcome,
        error="; ".join(sorted({f"{e}: {m}" for e, m in zip(failed["error"], failed["error_message"], strict=True)})),
        start_s=start_s,
        num_ranks=run.num_ranks,
        num_ranks_logged=len(np.unique(np.concatenate([started["rank"], moved["rank"], ends["rank"]]))),
        num_nodes=run.num_nodes,
        num_layers=num_layers,
        num_unchanged_layers=num_unchanged,
        skipped_layers=tuple(int(layer) for layer in skipped) if len(layers) == num_layers else (),
        duration_ms=float(ends["duration_ms"].max()) if len(ends["rank"]) else duration_ms,
        **times,
        overlap=float(finished["overlap"].mean()) if len(finished["rank"]) else math.nan,
        copied_nbytes=int(moved["copied_nbytes"].sum()),
        **{name: int(moved[name].sum()) for name in LINK_NBYTES},
        committed_nbytes=int(committed["nbytes"].sum()),
        num_stalls=len(stalls),
        stall_p50_ms=float(p50),
        stall_p99_ms=float(p99),
        stall_max_ms=float(worst),
        num_fence_waits=len(fences["rank"]),
        fence_wait_ms=float(fences["duration_ms"].sum()),
        num_passes_beside=int(beside[1].sum()),
        pass_beside_p50_ms=beside_p50,
        pass_beside_p99_ms=beside_p99,
        pass_beside_max_ms=beside_max,
        pass_p50_ms=others_p50,
        pass_p99_ms=others_p99,
        balancedness_before=balance[0],
        balancedness_after=balance[1],
        saved_ms_per_step=saved,
        break_even_steps=(float(ends["duration_ms"].max(initial=0)) or duration_ms) / saved if saved > 0 else math.nan,
    )


def _extent(tables: tuple[Table, ...]) -> tuple[float, float]:
    """Return the start of the first event in seconds, and the time from it to the end of the last in milliseconds."""
    logged = [t for t in tables if len(t["rank"])]
    if not logged:
        return math.nan, math.nan
    start = min(float((t["time_s"] - t["duration_ms"] / 1e3).min()) for t in logged)
    return start, (max(float(t["time_s"].max()) for t in logged) - start) * 1e3


def _slowest_rank(table: Table, key: str) -> float:
    return float(np.bincount(table["rank"], weights=table[key]).max()) if len(table["rank"]) else math.nan


def _stalls(committed: Table, fences: Table) -> NDArray[np.float64]:
    """Return the host time in milliseconds of commits and fences, summed by step and rank: float64 ``[steps]``."""
    # step is 0 in the exclusive mode, where no step waits
    serving = committed["step"] > 0
    ranks = np.concatenate([committed["rank"][serving], fences["rank"]])
    steps = np.concatenate([committed["step"][serving], fences["step"]])
    lost = np.concatenate([committed["copy_ms"][serving], fences["duration_ms"]])
    _, index = np.unique((ranks << 40) + steps, return_inverse=True)
    return np.bincount(index.reshape(-1), weights=lost).astype(np.float64)


def _passes(run: Run, beside: str, generation: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return passes of all ranks: times in milliseconds ``[times]``, and how many passes took so long ``[times]``."""
    timed = run.events(PassesTimed.name, generation)
    chosen = np.flatnonzero(timed["beside"] == beside)
    lists = zip(timed["times_ms"][chosen], timed["num_passes_by_time"][chosen], strict=True)
    counted = [pair for times, nums in lists for pair in zip(times, nums, strict=False)]
    return np.array([time for time, _ in counted]), np.array([num for _, num in counted], dtype=np.int64)


def _balance(run: Run, generation: int) -> tuple[float, float]:
    """Return balancedness before and after the update; estimates, if the end of its rebalance is not logged."""
    finished = run.events(RebalanceFinished.name, generation)
    moved = np.flatnonzero(finished["moved"])
    if len(moved):
        return float(finished["balancedness_before"][moved[0]]), float(finished["balancedness_after"][moved[0]])
    evaluated = run.events(RebalanceEvaluated.name, generation - 1)
    paying = np.flatnonzero(evaluated["pays"])
    if len(paying):
        first = paying[0]
        return tuple(float(evaluated[f"mean_balancedness_{when}"][first]) for when in ("before", "after"))  # type: ignore[return-value]
    return math.nan, math.nan


def _saved(run: Run, generation: int) -> float:
    evaluated = run.events(RebalanceEvaluated.name, generation - 1)
    paying = evaluated["saved_ms_per_step"][evaluated["pays"].astype(bool)]
    return float(paying[0]) if len(paying) else math.nan


def _rebalances(run: Run) -> Iterator[RebalanceReport]:
    evaluated = run.events(RebalanceEvaluated.name)
    if not len(evaluated["rank"]):
        return
    first = np.flatnonzero(evaluated["rank"] == evaluated["rank"].min())
    for index in first[np.argsort(evaluated["time_s"][first])]:
        yield RebalanceReport(
            run_id=run.run_id,
            time_s=float(evaluated["time_s"][index]),
            pays=bool(evaluated["pays"][index]),
            reason=str(evaluated["reason"][index]),
            balancedness_before=float(evaluated["mean_balancedness_before"][index]),
            balancedness_after=float(evaluated["mean_balancedness_after"][index]),
        )


def _faults(run: Run) -> Iterator[str]:
    failed = run.events(UpdateFailed.name)
    for generation, rank, error, message, number in zip(
        *(failed[key] for key in ("generation", "rank", "error", "error_message", "num_committed_layers")), strict=True
    ):
        yield f"update {generation} failed on rank {rank} after {number} layers: {error}: {message}"
    dropped = run.events(LogDropped.name)
    for rank, number, error in zip(dropped["rank"], dropped["num_events"], dropped["error"], strict=True):
        yield f"rank {rank} dropped {number} events from its log{f': {error}' if error else ''}"
    yield from run.clocks.notes
