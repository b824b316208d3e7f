"""The current activities of an update's stages, and which of them takes too long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from anyio import current_time, sleep


class Doing(Enum):
    """One kind of thing that a stage does with a layer, how many time-outs it may take, and whether it needs steps."""

    PLAN = ("planning", 1, False)
    COPY_OWN_SLOTS = ("copying own slots", 1, False)
    AWAIT_LAUNCH = ("waiting for its launch", 1, True)
    START = ("starting", 1, False)
    RECEIVE = ("receiving", 1, False)
    CHECK = ("checking", 1, False)
    AWAIT_RANKS = ("waiting for all ranks", 2, True)
    """Longer, so that the rank that hangs notices it first."""
    AWAIT_STEP = ("waiting for a step", 2, True)
    COPY = ("copying", 1, False)
    AWAIT_DEVICE = ("waiting for the device", 1, False)

    def __init__(self, words: str, patience: int, needs_steps: bool) -> None:  # noqa: FBT001 - a column of the table
        self.words = words
        self.patience = patience
        self.needs_steps = needs_steps


@dataclass(frozen=True, slots=True)
class Activity:
    """One thing that a stage does.

    :param stage: one of :data:`async_eplb.events.stages.WATCHED`
    :param index: number of the layer in update order
    :param since: in seconds, on the clock of what needs steps, or the event loop's
    """

    stage: str
    index: int
    doing: Doing
    since: float

    def __str__(self) -> str:
        return f"{self.stage}: layer number {self.index}, {self.doing.words}"


_LOOKS = 8
"""Looks at the steps in one time-out."""


class Watchdog:
    """Records what is being done, and finds what takes longer than it may.

    For what needs steps, time passes only while steps are made: traffic may pause for days (rule 18).

    :param timeout_s: how long a stage may do one thing
    :param steps: returns a value that is another one after each step of any rank; None while all time counts
    """

    def __init__(self, timeout_s: float, steps: Callable[[], object]) -> None:
        self.timeout_s = timeout_s
        self._steps = steps
        self._stepping_s = 0.0
        self._last_look: tuple[float, object] = 0.0, None
        self._activities: list[Activity] = []
        self._reported: set[Activity] = set()

    @property
    def activities(self) -> tuple[Activity, ...]:
        """All that is being done, in the order in which it began."""
        return tuple(self._activities)

    @contextmanager
    def doing(self, stage: str, index: int, what: Doing) -> Iterator[None]:
        """Record, for the time of the body, that a stage does something with a layer."""
        activity = Activity(stage, index, what, self._now(what))
        self._activities.append(activity)
        try:
            yield
        finally:
            self._activities.remove(activity)

    async def until_stalled(self) -> Activity:
        """Return what next takes too long, and was not returned before; never, if all goes well."""
        self._last_look = current_time(), self._steps()
        while True:
            unreported = [activity for activity in self._activities if activity not in self._reported]
            first = min(unreported, key=self._left_s, default=None)
            if first is not None and self._left_s(first) <= 0:
                self._reported.add(first)
                return first
            # What needs steps is looked at regularly: its time may stand still.
            left_s = (self._left_s(activity) for activity in unreported if not activity.doing.needs_steps)
            await sleep(min((self.timeout_s / _LOOKS, *left_s)))
            self._look()

    def _look(self) -> None:
        """Count the time since the last look, if a step was made in it."""
        last_s, before = self._last_look
        self._last_look = now_s, steps = current_time(), self._steps()
        if steps is None or steps != before:
            self._stepping_s += now_s - last_s

    def _now(self, what: Doing) -> float:
        return self._stepping_s if what.needs_steps else current_time()

    def _left_s(self, activity: Activity) -> float:
        doing = activity.doing
        unseen_s = self.timeout_s / _LOOKS if doing.needs_steps else 0.0  # since the look before it began
        return activity.since + self.timeout_s * doing.patience + unseen_s - self._now(doing)
