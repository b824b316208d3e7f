"""What the stages of an update do and since when, and which of them has done it for too long."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import current_time, sleep

from async_eplb.events.stages import AGREE

_PATIENCE = {AGREE: 2}
"""Who waits for other ranks waits longer, so that the one that hangs says so first."""


@dataclass(frozen=True, slots=True)
class Activity:
    """One thing that a stage does.

    :param stage: one of :data:`async_eplb.events.stages.WATCHED`
    :param index: number of the layer in update order
    :param since: on the event loop's clock, in seconds
    """

    stage: str
    index: int
    doing: str
    since: float

    def __str__(self) -> str:
        return f"{self.stage}: layer number {self.index}, {self.doing}"


class Watchdog:
    """Knows what is being done, and tells when something takes longer than it may.

    :param timeout_s: how long a stage may do one thing
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._activities: list[Activity] = []
        self._told: set[Activity] = set()

    @property
    def activities(self) -> tuple[Activity, ...]:
        """All that is being done, longest first."""
        return tuple(sorted(self._activities, key=lambda activity: activity.since))

    @contextmanager
    def doing(self, stage: str, index: int, what: str) -> Iterator[None]:
        """Inside, a stage does something with a layer."""
        activity = Activity(stage, index, what, current_time())
        self._activities.append(activity)
        try:
            yield
        finally:
            self._activities.remove(activity)

    async def until_stalled(self) -> Activity:
        """Return what next takes too long, and was not returned before; never, if all goes well."""
        while True:
            now = current_time()
            untold = (activity for activity in self._activities if activity not in self._told)
            first = min(untold, key=self._due_s, default=None)
            if first is not None and self._due_s(first) <= now:
                self._told.add(first)
                return first
            await sleep(self.timeout_s if first is None else min(self._due_s(first) - now, self.timeout_s))

    def _due_s(self, activity: Activity) -> float:
        return activity.since + self.timeout_s * _PATIENCE.get(activity.stage, 1)
