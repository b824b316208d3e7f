"""Times of forward passes, beside updates and without: counted by the serving thread, logged by the event loop."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_eplb.events.schema import PassesTimed

BOUNDS_MS = tuple(0.25 * 2 ** (number / 4) for number in range(73))
"""Passes between two of these are counted together, and known by their mean: up to 66 s, in steps of a fifth."""
PERIOD_S = 60.0
"""Passes of so much time are logged together, or fewer: those before an update, beside it, and after it."""
PAUSE_S = 5.0
"""If so much time passes between two steps, there was no traffic: this is no pass."""


@dataclass(slots=True)
class PassTotals:
    """All passes of one kind so far. Times are in milliseconds.

    :param num: of passes
    :param total_ms: time of all of them together
    :param longest_ms: of the longest
    """

    num: int = 0
    total_ms: float = 0.0
    longest_ms: float = 0.0

    @property
    def mean_ms(self) -> float:
        """Return the mean; 0 if there was no pass."""
        return self.total_ms / self.num if self.num else 0.0

    def add(self, ms: float) -> None:
        """Count a pass."""
        self.num += 1
        self.total_ms += ms
        self.longest_ms = max(self.longest_ms, ms)


class PassPeriod:
    """Successive passes that are logged together.

    :param generation: of the update beside them; 0 if there is none
    """

    def __init__(self, generation: int, began_s: float) -> None:
        self.generation = generation
        self.began_s = began_s
        self.num_pauses = 0
        self.longest_ms = 0.0
        self._nums = [0] * (len(BOUNDS_MS) + 1)
        self._sums_ms = [0.0] * (len(BOUNDS_MS) + 1)

    def __bool__(self) -> bool:
        return any(self._nums)

    def add(self, ms: float) -> None:
        """Count a pass."""
        place = bisect_left(BOUNDS_MS, ms)
        self._nums[place] += 1
        self._sums_ms[place] += ms
        self.longest_ms = max(self.longest_ms, ms)

    def event(self, *, generation: int, rank: int, step: int) -> PassesTimed:
        """Return these passes as an event.

        :param generation: of the last update that was begun
        """
        times_ms = [total / num for num, total in zip(self._nums, self._sums_ms, strict=True) if num]
        nums = [num for num in self._nums if num]
        p50, p99 = percentiles(times_ms, nums, (50, 99))
        return PassesTimed(
            generation=self.generation or generation,
            rank=rank,
            step=step,
            beside="update" if self.generation else "nothing",
            num_passes=sum(nums),
            num_pauses=self.num_pauses,
            mean_ms=sum(self._sums_ms) / sum(nums),
            p50_ms=p50,
            p99_ms=p99,
            max_ms=self.longest_ms,
            times_ms=times_ms,
            num_passes_by_time=nums,
        )


class PassTimer:
    """Counts passes, from the end of a step to the end of the next. Costs the serving thread a microsecond.

    :param generation: returns that of the update under way, 0 if there is none
    :param hand_over: called in the thread that steps when there is something in :meth:`periods`
    """

    def __init__(self, generation: Callable[[], int], hand_over: Callable[[], None]) -> None:
        self.beside, self.alone = PassTotals(), PassTotals()
        """Passes with an update under way at their beginning or end, and all others."""
        self._generation = generation
        self._hand_over = hand_over
        self._last = 0
        self._end_s = math.nan
        self._period = PassPeriod(0, -math.inf)
        self._closed: deque[PassPeriod] = deque()

    def passed(self, start_s: float, end_s: float) -> None:
        """Count the pass that ended with a step.

        :param start_s: when the step began, on a monotonic clock, and so for ``end_s``
        """
        before_s, self._end_s = self._end_s, end_s
        now = self._generation()
        generation, self._last = now or self._last, now
        period = self._period
        if generation != period.generation or end_s - period.began_s > PERIOD_S:
            self._close()
            period = self._period = PassPeriod(generation, end_s)
        if start_s - before_s < PAUSE_S:  # not if the time before is unknown, which is NaN
            ms = (end_s - before_s) * 1e3
            period.add(ms)
            (self.beside if generation else self.alone).add(ms)
        elif before_s == before_s:  # noqa: PLR0124 - it is known
            period.num_pauses += 1

    def skip(self) -> None:
        """Forget the last step: whatever comes before the next one is no pass. Nobody is in a step meanwhile."""
        self._end_s = math.nan

    def close(self) -> None:
        """Hand over what has been counted so far. Nobody is in a step meanwhile."""
        self.skip()
        self._close()
        self._period = PassPeriod(0, -math.inf)

    def periods(self) -> Iterator[PassPeriod]:
        """Yield what has been handed over, once; in any thread."""
        while self._closed:
            yield self._closed.popleft()

    def _close(self) -> None:
        if self._period:
            self._closed.append(self._period)
            self._hand_over()


def percentiles(
    times_ms: Sequence[float] | npt.NDArray[np.float64],
    nums: Sequence[int] | npt.NDArray[np.int64],
    percents: Sequence[float],
) -> list[float]:
    """Return percentiles of passes that are counted by their time; NaN if there are none.

    :param times_ms: in any order; equal ones may be there several times
    :param nums: how many passes took so long
    """
    if not len(times_ms):
        return [math.nan] * len(percents)
    times, order = np.asarray(times_ms, dtype=np.float64), np.argsort(times_ms)  # [times] both
    ranks = np.cumsum(np.asarray(nums)[order])  # [times]: passes that took so long at most
    places = np.searchsorted(ranks, np.asarray(percents) / 100 * ranks[-1])  # [percents]
    return [float(time) for time in times[order][places]]
