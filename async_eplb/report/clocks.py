"""One time line for all ranks of a run: how far each rank's monotonic clock is from the first one's.

Ranks of one host share that clock: wall clock minus monotonic clock is the host's start, equal for all of its ranks.
Clocks of other hosts are aligned by two events that all ranks log after the same control round, within moments of each
other: the start and the end of an update.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import UpdateFailed, UpdateFinished, UpdateStarted
from async_eplb.report.columns import Table
from async_eplb.report.reading import EventLog

SAME_HOST_S = 0.01
"""Ranks whose hosts started within this time are assumed to share a host."""

SAME_CLOCK_S = 0.1
"""A smaller difference between clocks is ignored: the rank is late, not its clock."""

JUMP_S = 1.0
"""A larger change of the wall clock against the monotonic one means that one of them was set."""

_MAX_NAMED = 8


@dataclass(frozen=True, slots=True, eq=False)
class Clocks:
    """Clocks of the ranks of one run.

    :param origin_s: time of the run's first event, on the time line
    :param offset_s: rank → seconds that its clock is ahead of the time line
    :param error_s: bound on the error of times of ranks of other hosts: how far shared events are apart after alignment
    :param notes: faults of clocks, in words
    """

    origin_s: float
    offset_s: dict[int, float]
    error_s: float
    notes: tuple[str, ...]

    def times_s(self, table: Table) -> NDArray[np.float64]:
        """Return the times at which events were emitted, float64 ``[rows]``, in seconds from the run's first event."""
        offsets = np.array([self.offset_s.get(int(rank), 0.0) for rank in np.unique(table["rank"])])
        positions = np.searchsorted(np.unique(table["rank"]), table["rank"])
        return np.asarray(table["monotonic_s"] - (offsets[positions] if len(offsets) else 0.0) - self.origin_s)


def set_clocks(log: EventLog, run: int) -> Clocks:
    """Return the aligned clocks of a run.

    :param run: number of the run in ``log.run_ids``
    """
    events = [table for table in (_of_run(table, run) for table in log.tables.values()) if len(table["rank"])]
    rank, monotonic, wall = (
        np.concatenate([table[key] for table in events]) for key in ("rank", "monotonic_s", "wall_s")
    )
    anchors = _anchors(log, run)
    ranks = [int(each) for each in np.unique(rank)]
    reference = max(ranks, key=lambda each: len(anchors.get(each, {})))
    starts_s = {each: wall[rank == each] - monotonic[rank == each] for each in ranks}
    jumps = {each: float(np.ptp(start_s)) for each, start_s in starts_s.items() if np.ptp(start_s) > JUMP_S}
    offsets: dict[int, float] = {}
    residuals = [0.0]
    for each in ranks:
        # two estimates: from the hosts' start times, and from events that both ranks logged at nearly the same moment
        by_wall_clock = float(np.median(starts_s[reference]) - np.median(starts_s[each]))
        shared = anchors.get(each, {}).keys() & anchors.get(reference, {}).keys()
        apart = [anchors[each][key] - anchors[reference][key] for key in shared]
        offset = float(np.median(apart)) if apart else by_wall_clock
        if abs(by_wall_clock) < SAME_HOST_S or abs(offset) < SAME_CLOCK_S:
            offsets[each] = 0.0
        else:
            offsets[each] = offset
            residuals += [abs(value - offset) for value in apart]
    starts = [float(monotonic[rank == each].min()) - offsets[each] for each in ranks]
    return Clocks(min(starts), offsets, max(residuals), tuple(_notes(jumps)))


def _notes(jumps: dict[int, float]) -> Iterator[str]:
    if jumps:
        more = len(jumps) - _MAX_NAMED
        ranks = ", ".join(map(str, list(jumps)[:_MAX_NAMED])) + (f" and {more} more" if more > 0 else "")
        yield (
            f"the wall clock left the monotonic one by up to {max(jumps.values()):.1f} s on rank {ranks}: "
            "one of them was set, and times may be wrong"
        )


def _of_run(table: Table, run: int) -> Table:
    mine = table["run_id"] == run
    return {name: table[name][mine] for name in ("rank", "generation", "monotonic_s", "wall_s")}


def _anchors(log: EventLog, run: int) -> dict[int, dict[tuple[str, int], float]]:
    anchors: dict[int, dict[tuple[str, int], float]] = {}
    for name, kind in ((UpdateStarted.name, "start"), (UpdateFinished.name, "end"), (UpdateFailed.name, "end")):
        table = _of_run(log.tables[name], run)
        for rank, generation, time_s in zip(table["rank"], table["generation"], table["monotonic_s"], strict=True):
            anchors.setdefault(int(rank), {})[kind, int(generation)] = float(time_s)
    return anchors
