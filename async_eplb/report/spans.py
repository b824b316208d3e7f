"""What each rank did when: one span for each stage of each layer, on the run's time line."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from async_eplb.errors import InvalidOptions
from async_eplb.events.schema import FenceWaited, LayerCommitted, LayerPlanned, LayerTransferred
from async_eplb.report.columns import Table
from async_eplb.report.runs import Run

STAGES = ("plan", "transfer", "wait", "commit")

MAX_LANES = 64
"""Ranks up to which each stage has a line of its own in a timeline; with more, stages are drawn over each other."""

FROM_BELOW = ("wait", "plan", "transfer", "commit")
"""Stages as they are drawn over each other."""

COLOURS = {"plan": "#7c6cc4", "transfer": "#2a7ab9", "wait": "#d5d9de", "commit": "#e07b39", "fence": "#c0272d"}
"""Of the stages, in all pictures."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Spans of one stage; arrays of equal length.

    :param starts_s: on the run's time line
    """

    ranks: NDArray[np.int64]
    layers: NDArray[np.int64]
    starts_s: NDArray[np.float64]
    ends_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ranks)


def stage_spans(run: Run, generation: int) -> dict[str, Spans]:
    """Return the spans of one update: stage → spans, ``fence`` too (its layers are steps)."""
    planned, moved, committed, fences = (
        run.events(event.name, generation) for event in (LayerPlanned, LayerTransferred, LayerCommitted, FenceWaited)
    )
    commit_starts = committed["time_s"] - committed["duration_ms"] / 1e3
    return {
        "plan": _ending(planned),
        "transfer": _ending(moved),
        "wait": Spans(committed["rank"], committed["layer"], commit_starts - committed["wait_ms"] / 1e3, commit_starts),
        "commit": _ending(committed),
        "fence": Spans(
            fences["rank"], fences["step"], fences["time_s"] - fences["duration_ms"] / 1e3, fences["time_s"]
        ),
    }


def updates_of(runs: list[Run]) -> Iterator[tuple[Run, int]]:
    """Yield run and generation of each update that moved a layer on any rank."""
    for run in runs:
        for generation in run.generations:
            if len(run.events(LayerTransferred.name, generation)["rank"]):
                yield run, generation


def pick_update(runs: list[Run], generation: int | None) -> tuple[Run, int]:
    """Return the last update, or the last one with a number.

    :raises InvalidOptions: if there is none
    """
    held = [each for each in updates_of(runs) if generation in (None, each[1])]
    if not held:
        what = "no update" if generation is None else f"no update {generation}"
        raise InvalidOptions(f"the log has {what} that moved a layer", option="update")
    return held[-1]


def _ending(table: Table) -> Spans:
    return Spans(table["rank"], table["layer"], table["time_s"] - table["duration_ms"] / 1e3, table["time_s"])
