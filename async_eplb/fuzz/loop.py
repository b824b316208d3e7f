"""An event loop under a virtual clock, in which a seed decides what runs next and ranks can be frozen."""

import asyncio
import random
from asyncio import Handle, TimerHandle
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from heapq import heappop
from typing import Any, TypeVar

try:
    from sniffio import current_async_library_cvar
except ImportError:  # then anyio does not look there
    current_async_library_cvar = ContextVar("NOBODY_READS")

T = TypeVar("T")

RANK: ContextVar[int] = ContextVar("RANK")
"""The rank that a task belongs to. Tasks of none, such as the world around the ranks, are never frozen."""


class Stuck(Exception):
    """Nothing can ever happen again, but a task still waits."""


class SimulatedTask(asyncio.Task[T]):
    """A task that knows its number, so that sets of tasks have the same order in every run."""

    number: int = 0

    def __hash__(self) -> int:
        return self.number


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs one callback at a time, drawn from all that are ready. Time passes only when nothing is ready.

    :param seed: of all choices; without one, callbacks run in the order in which they became ready
    :param after_event: called after each callback, with the rank that it belongs to; what it raises ends the run
    """

    def __init__(self, seed: int | None, after_event: Callable[[int | None], None] = lambda _rank: None) -> None:
        super().__init__()
        self.random = random.Random(seed)  # noqa: S311 - repeatable choices, not secrets
        self._draws = seed is not None
        self.after_event = after_event
        self.broken_by: Exception | None = None
        """Raised at once if it is set: tasks of frozen ranks would never end by themselves."""
        self.num_events = 0
        self.history = 0
        """A hash of every choice so far: equal runs have equal histories."""
        self.frozen: set[int] = set()
        """Ranks whose callbacks do not run until :meth:`thaw` takes them from this set."""
        self._now = 0.0
        self._num_tasks = 0
        self._ready: list[Handle] = []
        self._scheduled: list[TimerHandle] = []
        self._withheld: list[Handle] = []
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self._now

    def thaw(self, rank: int) -> None:
        """Let a frozen rank run again."""
        self.frozen.discard(rank)
        self._ready += self._withheld
        self._withheld = []

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        **options: Any,  # noqa: ANN401 - asyncio's
    ) -> SimulatedTask[T]:
        self._num_tasks += 1
        SimulatedTask.number = self._num_tasks  # a task is put into sets before its constructor returns
        task = SimulatedTask(coroutine, loop=loop, **options)
        task.number = self._num_tasks
        return task

    def _run_once(self) -> None:
        """Run one callback."""
        ready = self._ready
        nothing = not ready or (self.frozen and all(map(_asks_again, ready)))
        while self._scheduled and (nothing or self._scheduled[0].when() <= self._now):
            timer = heappop(self._scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            if not timer.cancelled():
                self._now = max(self._now, timer.when())
                ready.append(timer)
                nothing = False
        if not ready:
            raise Stuck(f"nothing can happen after {self._now} s")
        number = 0
        if len(ready) > 1 and self._draws:
            ready.sort(key=_order)
            number = int(self.random.random() * len(ready))
        handle = ready.pop(number)
        if handle._cancelled:
            return
        rank = handle._context.get(RANK, None)  # type: ignore[attr-defined]
        if self.frozen and rank in self.frozen:
            self._withheld.append(handle)
            return
        self.num_events += 1
        self.history = hash((self.history, number, len(ready), self._now))
        handle._run()
        self.after_event(rank)
        if self.broken_by is not None:
            raise self.broken_by

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Leave a cancelled timer where it is; it is passed over when it is due."""

    def _write_to_self(self) -> None:
        """Do nothing: no other thread calls."""


def _callback(handle: Handle) -> object:
    return handle._callback  # type: ignore[attr-defined]


def _asks_again(handle: Handle) -> bool:
    """Whether this is anyio's callback that, in each turn of the loop, cancels a task anew until it has ended.

    The task of a frozen rank does not end; without this, such callbacks would keep time from passing.
    """
    return getattr(_callback(handle), "__name__", "") == "_deliver_cancellation"


def _order(handle: Handle) -> int:
    """Return the number of a callback's task, or 0: anyio cancels sets of tasks in the order of their addresses."""
    task = getattr(_callback(handle), "__self__", None)
    return task.number if isinstance(task, SimulatedTask) else 0


def run(loop: SimulatedLoop, main: Callable[[], Coroutine[Any, Any, T]], context: Context | None = None) -> T:
    """Run ``main`` to its end in a loop and close it."""
    context = copy_context() if context is None else context
    context.run(current_async_library_cvar.set, "asyncio")  # or anyio finds out by the current task, each time
    try:
        return loop.run_until_complete(loop.create_task(main(), context=context))
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined] # left behind where a run broke off
        loop.close()
