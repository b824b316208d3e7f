"""The one seam between the event loop and threads: where blocking work runs, and how a thread wakes the loop."""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from anyio import CapacityLimiter, Event, notify_closing, to_thread, wait_readable

T = TypeVar("T")


class Doorbell(Protocol):
    """Wakes the event loop. Rings that nobody waits for yet are kept, as one."""

    def ring(self) -> None:
        """Wake who waits, from any thread and without waiting for the loop."""
        ...

    async def wait(self) -> None:
        """Return after the next ring."""
        ...

    def close(self) -> None:
        """Give back what the doorbell holds. It may still be rung, for nobody."""
        ...


class Workers(Protocol):
    """Runs blocking functions on behalf of the event loop."""

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` to its end, also when the awaiting task is cancelled.

        :param kind: name of the work; of each kind, one function runs at a time
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
    """Workers whose kinds of work are not those of others on the same threads' owner.

    :param prefix: of the names of its kinds
    """

    def __init__(self, workers: Workers, prefix: str) -> None:
        self._workers = workers
        self._prefix = prefix

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` beside what the others do of this kind."""
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
        """Write a byte. If the pipe is full, it rings already; if it is closed, nobody listens."""
        with suppress(OSError):
            self._button.send(b"\0")

    async def wait(self) -> None:
        """Wait for a byte, and take all there are."""
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
        """Wake who waits."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for a ring."""
        await self._event.wait()
        self._event = Event()

    def close(self) -> None:
        """Do nothing."""


class News:
    """Lets tasks of one event loop wait until something holds."""

    def __init__(self) -> None:
        self._event = Event()

    def notify(self) -> None:
        """Let every waiting task look again."""
        self._event.set()
        self._event = Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once ``holds`` does. It is looked at now and after each :meth:`notify`."""
        while not holds():
            await self.until_notified()

    async def until_notified(self) -> None:
        """Return after the next :meth:`notify`."""
        await self._event.wait()
