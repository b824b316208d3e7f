"""Workers without threads, for tests under a virtual clock."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import anyio

from async_eplb.workers import Doorbell, LoopDoorbell

T = TypeVar("T")


class ScheduledWorkers:
    """Workers without threads: a function runs at once, then a set time passes on the event loop's clock.

    Under a virtual clock this makes runs that take no real time and are the same every time.

    :param durations_s: kind of work (:class:`async_eplb.workers.Work`) → seconds; zero for kinds that are not named
    """

    def __init__(self, durations_s: Mapping[str, float] | None = None) -> None:
        self._durations_s = durations_s or {}
        self._turns: dict[str, anyio.Lock] = {}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function``, then wait for the time of its kind; one of a kind at a time."""
        async with self._turns.setdefault(kind, anyio.Lock()):
            result = function()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self._durations_s.get(kind, 0.0))
            return result

    def doorbell(self) -> Doorbell:
        """Return a doorbell inside the event loop."""
        return LoopDoorbell()
