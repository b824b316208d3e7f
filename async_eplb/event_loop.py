"""Event loops: the one that an object belongs to, and one in a thread of its own for callers that have none."""

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import TypeVar

import anyio
from anyio import Event, current_effective_deadline, get_cancelled_exc_class, move_on_after
from anyio.from_thread import BlockingPortal
from anyio.lowlevel import current_token

from async_eplb.errors import ClosedUpdater, WrongEventLoop

T = TypeVar("T")
Started = Callable[[Callable[[], object]], None]


def run_soon() -> Callable[[Callable[[], object]], object]:
    """Return what runs a function in the running event loop soon, from any thread and without waiting for it.

    It raises RuntimeError when the loop has ended.
    """
    loop = _running_loop()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.call_soon_threadsafe
    return loop.run_sync_soon  # type: ignore[attr-defined, no-any-return] # trio's


def _running_loop() -> object:
    """Return the event loop that runs in this thread, also in a plain callback of asyncio's.

    :raises RuntimeError: if none does
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return current_token().native_token


async def outlast(event: Event, timeout_s: float = math.inf) -> list[BaseException]:
    """Wait for an event however often asyncio cancels the task, which no shield keeps off; return the cancellations."""
    cancelled: list[BaseException] = []
    with move_on_after(timeout_s):
        while not event.is_set():
            try:
                await event.wait()
            except get_cancelled_exc_class() as error:
                if current_effective_deadline() == -math.inf:
                    raise
                cancelled.append(error)
    return cancelled


class HomeLoop:
    """The event loop that an object belongs to once it is opened (rule 25)."""

    def __init__(self) -> None:
        self._loop: object = None

    def settle(self) -> None:
        """Belong to the running event loop from now on."""
        self._loop = _running_loop()

    def require(self, owner: object) -> None:
        """Check that the running event loop is the one that ``owner`` belongs to, if it belongs to one already.

        :raises WrongEventLoop: if not
        """
        if self._loop is None:
            return
        try:
            elsewhere = _running_loop() is not self._loop
        except RuntimeError:  # no event loop runs in this thread
            elsewhere = True
        if elsewhere:
            raise WrongEventLoop(
                f"{owner!r} was opened in another event loop than that of {threading.current_thread().name!r}; use it "
                "there, or a SyncUpdater, which is for all threads"
            )


class LoopThread:
    """An event loop in a daemon thread, for callers without one.

    :param backend: as anyio calls it
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._thread: threading.Thread | None = None
        self._portal: BlockingPortal | None = None
        self._stop: Callable[[], object] = lambda: None

    def start(self) -> None:
        """Begin to run the event loop.

        :raises LookupError: if there is no such event loop
        """
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="eplb-event-loop", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self, timeout_s: float | None = None) -> None:
        """Cancel what still runs, and wait for the end of the thread, no longer than a time-out."""
        self._portal = None
        with suppress(RuntimeError):  # it has ended
            self._stop()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run an asynchronous function in the event loop and return its result; cancel it if this is interrupted.

        :raises ClosedUpdater: if the event loop does not run, or ends before the function does
        :raises WrongEventLoop: in the thread of the event loop, which cannot wait for itself
        """
        future = self.begin(function)
        try:
            return future.result()
        except CancelledError as error:
            raise ClosedUpdater("the event loop was stopped meanwhile") from error
        except BaseException:
            future.cancel()
            raise

    def begin(self, function: Callable[[], Awaitable[T]]) -> Future[T]:
        """Begin to run an asynchronous function in the event loop.

        :raises ClosedUpdater: if the event loop does not run
        :raises WrongEventLoop: in the thread of the event loop
        """
        if threading.current_thread() is self._thread:
            raise WrongEventLoop("this would block the event loop that it waits for; call it from another thread")
        try:
            if self._portal is not None:
                return self._portal.start_task_soon(function)
        except RuntimeError as error:
            raise ClosedUpdater("the event loop was stopped meanwhile") from error
        raise ClosedUpdater("no event loop runs: enter the SyncUpdater first, and do not leave it before")

    def start_task(self, function: Callable[["Started"], Awaitable[None]]) -> "BackgroundTask":
        """Begin an asynchronous function that runs until it is asked to end; return when it has started.

        :param function: calls what it is given, once it has started, with what asks it to end
        :raises Exception: what it raises before
        """
        started: Future[Callable[[], object]] = Future()
        ended = self.begin(partial(function, started.set_result))
        ended.add_done_callback(lambda _ended: started.cancel())  # without effect if it has started
        try:
            return BackgroundTask(started.result(), ended)
        except CancelledError:
            ended.result()
            raise
        except BaseException:
            ended.cancel()
            raise

    def hold(self, context: AbstractAsyncContextManager[object]) -> "BackgroundTask":
        """Enter an asynchronous context manager, and leave it when the task that is returned ends.

        :raises Exception: what entering raises
        """

        async def enter_and_leave(started: Started) -> None:
            async with context:
                leave = Event()
                started(partial(run_soon(), leave.set))
                await leave.wait()

        return self.start_task(enter_and_leave)

    def _run(self, ready: Future[None]) -> None:
        async def serve() -> None:
            async with BlockingPortal() as portal:
                stopped = Event()
                self._portal, self._stop = portal, partial(run_soon(), stopped.set)
                ready.set_result(None)
                await stopped.wait()
                await portal.stop(cancel_remaining=True)

        try:
            anyio.run(serve, backend=self._backend)
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)


class BackgroundTask:
    """A task of the event loop of a :class:`LoopThread`.

    :param ask: asks it to end
    :param ended: done when it has
    """

    def __init__(self, ask: Callable[[], object], ended: Future[None]) -> None:
        self._ask = ask
        self._ended = ended

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    def end(self, timeout_s: float | None = None) -> BaseException | None:
        """Ask the task to end, wait for that, and return what it raised.

        :raises TimeoutError: if it does not end in time
        """
        with suppress(RuntimeError):  # the event loop has ended
            self._ask()
        try:
            return self._ended.exception(timeout_s)
        except CancelledError:
            return ClosedUpdater("the event loop was stopped before")
