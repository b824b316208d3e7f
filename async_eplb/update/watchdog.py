"""The current activities of an update's stages, and which of them takes too long."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from anyio import current_time, sleep


class Doing(Enum):
    """One kind of thing that a stage does with a layer, and how many time-outs it may take."""

    PLAN = ("planning", 1)
    COPY_OWN_SLOTS = ("copying own slots", 1)
    AWAIT_LAUNCH = ("waiting for its launch", 1)
    START = ("starting", 1)
    RECEIVE = ("receiving", 1)
    CHECK = ("checking", 1)
    AWAIT_RANKS = ("waiting for all ranks", 2)
    """Longer, so that the rank that hangs notices it first."""
    AWAIT_STEP = ("waiting for a step", 2)
    COPY = ("copying", 1)
    AWAIT_DEVICE = ("waiting for the device", 1)

    def __init__(self, words: str, patience: int) -> None:
        self.words = words
        self.patience = patience


@dataclass(frozen=True, slots=True)
class Activity:
    """One thing that a stage does.

    :param stage: one of :data:`async_eplb.events.stages.WATCHED`
    :param index: number of the layer in update order
    :param since: on the event loop's clock, in seconds
    """

    stage: str
    index: int
    doing: Doing
    since: float

    def __str__(self) -> str:
        return f"{self.stage}: layer number {self.index}, {self.doing.words}"


class Watchdog:
    """Records what is being done, and finds what takes longer than it may.

    :param timeout_s: how long a stage may do one thing
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._activities: list[Activity] = []
        self._reported: set[Activity] = set()

    @property
    def activities(self) -> tuple[Activity, ...]:
        """All that is being done, longest first."""
        return tuple(sorted(self._activities, key=lambda activity: activity.since))

    @contextmanager
    def doing(self, stage: str, index: int, what: Doing) -> Iterator[None]:
        """Record, for the time of the body, that a stage does something with a layer."""
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
            unreported = (activity for activity in self._activities if activity not in self._reported)
            first = min(unreported, key=self._due_s, default=None)
            if first is not None and self._due_s(first) <= now:
                self._reported.add(first)
                return first
            await sleep(self.timeout_s if first is None else min(self._due_s(first) - now, self.timeout_s))

    def _due_s(self, activity: Activity) -> float:
        return activity.since + self.timeout_s * activity.doing.patience
