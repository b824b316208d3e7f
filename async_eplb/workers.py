"""Between the event loop and threads: where blocking work runs, and how a thread wakes the loop."""

import atexit
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar
from weakref import finalize

from anyio import CancelScope, Event, notify_closing, wait_readable
from anyio.lowlevel import checkpoint_if_cancelled

from async_eplb.event_loop import run_soon

T = TypeVar("T")

_EXIT_S = 0.25
"""How long the interpreter's end waits for functions under way, before it interrupts them and again after."""


class Work(StrEnum):
    """Kinds of blocking work. Functions of one kind run one after another, those of different kinds at once."""

    PLAN = "plan"
    """Plan a layer of an update."""
    TRANSFER = "transfer"
    """Plan an update, fill staging, launch transfers."""
    PULL = "pull"
    """Enqueue copies from other ranks' memory."""
    EXCHANGE = "exchange"
    """Wait for a layer's transfer."""
    RELAY = "relay"
    """Wait for the second hop of a layer's transfer."""
    CHECK = "check"
    """Verify a layer in staging."""
    COMMIT = "commit"
    """Write live weights outside a step."""
    FINISH = "finish"
    """Wait for a commit on the device, and verify it."""
    CONNECT = "connect"
    """Connect ranks, and allocate what updates need; control rounds of another transport may go on."""
    CONTROL = "control"
    """Take part in control rounds."""
    LOAD = "load"
    """Copy loads, and sum them over ranks."""
    POLICY = "policy"
    """Compute a placement."""


class Doorbell(Protocol):
    """Wakes the event loop from any thread. Rings before a wait are kept, as one."""

    def ring(self) -> None:
        """Wake the waiting task, from any thread and without waiting for the loop."""
        ...

    async def wait(self) -> None:
        """Wait for a ring since the last wait."""
        ...

    def close(self) -> None:
        """Free what the doorbell uses. Later rings do nothing."""
        ...


class Workers(Protocol):
    """Runs blocking functions on behalf of the event loop."""

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` to its end, also when the awaiting task is cancelled, and return its result.

        :param kind: a :class:`Work`, or another name; of each kind, one function runs at a time
        """
        ...

    def doorbell(self) -> Doorbell:
        """Return a doorbell of the running event loop."""
        ...


@dataclass(frozen=True, slots=True)
class Interruptible(Generic[T]):
    """A blocking function for workers, which another thread can make end soon: the interpreter's end does.

    :param interrupt: makes ``function`` end, with an error
    """

    function: Callable[[], T]
    interrupt: Callable[[], None]

    def __call__(self) -> T:
        """Run the function."""
        return self.function()


class ThreadWorkers:
    """One thread for each kind of work, as long as this object lives. None keeps the process from ending (rule 20).

    The end of the interpreter waits for functions under way for up to half a second, for what returns to Python from
    torch after that would abort the process. Functions that may block for longer are :class:`Interruptible`.
    """

    def __init__(self) -> None:
        self._threads: dict[str, _WorkThread] = {}
        at_exit = partial(_end, self._threads)
        atexit.register(at_exit)
        finalize(self, _forget, self._threads, at_exit).atexit = False

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` in the thread of its kind."""
        await checkpoint_if_cancelled()
        ended, outcome = Event(), Future[T]()
        tell = partial(run_soon(), ended.set)
        if kind not in self._threads:
            self._threads[kind] = _WorkThread(f"eplb-{kind}")
        in_context = partial(copy_context().run, function)
        self._threads[kind].submit(_Call(function, partial(_carry_out, in_context, outcome, tell)))
        try:
            with CancelScope(shield=True):
                await ended.wait()
            return outcome.result()
        finally:
            del outcome  # which has the error, whose traceback has this frame

    def doorbell(self) -> Doorbell:
        """Return a doorbell for other threads."""
        return SocketDoorbell()


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a function in another thread.

    :param run: calls it, and tells its caller
    """

    function: Callable[[], object]
    run: Callable[[], None]

    def interrupt(self) -> None:
        """Make the function end, if it can be."""
        if isinstance(self.function, Interruptible):
            self.function.interrupt()


def _carry_out(function: Callable[[], T], outcome: Future[T], tell: Callable[[], object]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:  # noqa: BLE001 - raised to the caller
        outcome.set_exception(error)
        del outcome  # which has the error, whose traceback has this frame
    with suppress(RuntimeError):  # the caller's event loop is closed
        tell()


class _WorkThread:
    """Runs calls one after another, in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._current: _Call | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: _Call) -> None:
        """Run a call when those before it have ended."""
        self._calls.put(call)

    def end(self) -> None:
        """End the thread after the calls so far."""
        self._calls.put(None)

    def interrupt(self) -> None:
        """End the present call, if it can be."""
        current = self._current
        if current is not None:
            with suppress(Exception):  # what cannot be interrupted is left to itself
                current.interrupt()

    def join(self, deadline: float) -> None:
        """Wait for the end of the thread, until a deadline on the clock of time.monotonic()."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while True:
            self._current = self._calls.get()
            if self._current is None:
                return
            self._current.run()
            self._current = None


def _forget(threads: Mapping[str, _WorkThread], at_exit: Callable[[], None]) -> None:
    """End the threads of workers that nobody has any more."""
    atexit.unregister(at_exit)
    for thread in threads.values():
        thread.end()


def _end(threads: Mapping[str, _WorkThread]) -> None:
    """Leave nothing inside torch that returns to Python when there is none any more."""
    running = list(threads.values())  # an event loop in a thread may still add to them
    for thread in running:
        thread.end()
    _join(running, time.monotonic() + _EXIT_S)
    for thread in running:
        thread.interrupt()
    _join(running, time.monotonic() + _EXIT_S)


def _join(threads: Sequence[_WorkThread], deadline: float) -> None:
    for thread in threads:
        thread.join(deadline)


class OtherWorkers:
    """Workers whose kinds of work are apart from the same kinds of the workers that they use.

    :param prefix: put before the name of each kind
    """

    def __init__(self, workers: Workers, prefix: str) -> None:
        self._workers = workers
        self._prefix = prefix

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` without waiting for work of this kind that was begun without the prefix."""
        return await self._workers.run(f"{self._prefix} {kind}", function)

    def doorbell(self) -> Doorbell:
        """Return a doorbell of the running event loop."""
        return self._workers.doorbell()


class SocketDoorbell:
    """A pair of sockets: a ring never waits for the loop, which may be blocked."""

    def __init__(self) -> None:
        self._button, self._bell = socket.socketpair()
        for end in (self._button, self._bell):
            end.settimeout(0)

    def ring(self) -> None:
        """Write a byte. A full pipe rings already, and a closed one is not listened to; both are ignored."""
        with suppress(OSError):
            self._button.send(b"\0")

    async def wait(self) -> None:
        """Wait for a byte, and read all there are."""
        await wait_readable(self._bell)
        self._bell.recv(4096)

    def close(self) -> None:
        """Close both sockets."""
        notify_closing(self._bell)
        self._bell.close()
        self._button.close()


class LoopDoorbell:
    """A doorbell inside one event loop, where no other thread rings."""

    def __init__(self) -> None:
        self._event = Event()

    def ring(self) -> None:
        """Wake the waiting task."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for a ring."""
        await self._event.wait()
        self._event = Event()

    def close(self) -> None:
        """Do nothing."""


class News:
    """Lets tasks of one event loop wait until a condition holds."""

    def __init__(self) -> None:
        self._event = Event()

    def notify(self) -> None:
        """Let every waiting task check its condition again."""
        self._event.set()
        self._event = Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until ``holds()`` is true. It is checked now and after each :meth:`notify`."""
        while not holds():
            await self.until_notified()

    async def until_notified(self) -> None:
        """Wait for the next :meth:`notify`."""
        await self._event.wait()
