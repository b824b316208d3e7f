"""Between the event loop and threads: where blocking work runs, and how a thread wakes the loop."""

import socket
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Protocol, TypeVar

from anyio import CapacityLimiter, Event, notify_closing, to_thread, wait_readable

T = TypeVar("T")


class Work(StrEnum):
    """Kinds of blocking work. Functions of one kind run one after another, those of different kinds at once."""

    PLAN = "plan"
    """Plan a layer of an update."""
    TRANSFER = "transfer"
    """Plan an update, reserve and fill staging, launch transfers."""
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
    """Connect ranks; control rounds of another transport may go on."""
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


class ThreadWorkers:
    """One worker thread for each kind of work."""

    def __init__(self) -> None:
        self._limiters: dict[str, CapacityLimiter] = {}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` in the thread of its kind."""
        limiter = self._limiters.setdefault(kind, CapacityLimiter(1))
        return await to_thread.run_sync(function, limiter=limiter)

    def doorbell(self) -> Doorbell:
        """Return a doorbell for other threads."""
        return SocketDoorbell()


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
