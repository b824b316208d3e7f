"""When each rank was in which stage: one interval for each stage of each layer, on the run's time line."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from async_eplb.errors import InvalidOptions
from async_eplb.events.schema import LayerTransferred
from async_eplb.events.stages import FENCE, STAGES, WAIT, Stage
from async_eplb.report.runs import Run

TRACKS = (*STAGES, FENCE)
"""What is drawn of each rank."""

MAX_LANES = 64
"""Ranks up to which each stage has a line of its own in a timeline; with more, stages are drawn over each other."""

FROM_BELOW = (WAIT, *(stage for stage in STAGES if stage is not WAIT))
"""Stages in the order in which they are drawn over each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Intervals of one stage of one update; arrays of equal length, in no particular order.

    :param ranks: int64 ``[intervals]``
    :param layers: int64 ``[intervals]``; of waits at fences, steps
    :param starts_s: float64 ``[intervals]``, on the run's time line
    :param ends_s: float64 ``[intervals]``, on the run's time line
    """

    ranks: NDArray[np.int64]
    layers: NDArray[np.int64]
    starts_s: NDArray[np.float64]
    ends_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ranks)


def stage_intervals(run: Run, generation: int) -> dict[str, Intervals]:
    """Return the intervals of one update: name of the stage → its intervals, for each of :data:`TRACKS`."""
    return {stage.name: _intervals(run, generation, stage) for stage in TRACKS}


def _intervals(run: Run, generation: int, stage: Stage) -> Intervals:
    events = run.events(stage.event.name, generation)
    ends_s = events["time_s"]
    if stage.followed_by:
        ends_s = ends_s - events[stage.followed_by] / 1e3
    return Intervals(events["rank"], events[stage.counted_by], ends_s - events[stage.duration] / 1e3, ends_s)


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
