"""Where blocking work runs: the one seam between the event loop and threads."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Workers(Protocol):
    """Runs blocking functions on behalf of the event loop."""

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` to its end, also when the awaiting task is cancelled.

        :param kind: name of the work; of each kind, one function runs at a time
        """
        ...


class ThreadWorkers:
    """One worker thread for each kind of work."""

    def __init__(self) -> None:
        self._limiters: dict[str, CapacityLimiter] = {}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` in the thread of its kind."""
        limiter = self._limiters.setdefault(kind, CapacityLimiter(1))
        return await to_thread.run_sync(function, limiter=limiter)
