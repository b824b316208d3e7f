"""What happens between two forward passes: nothing, or an update that everything waits for.

The engine knows this seam only. ``async_eplb.ExpertUpdater`` has the same two methods, and moves experts while passes
go on.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from async_eplb import ExpertPlacement, ExpertUpdater, UpdateSummary


class StepBoundary(Protocol):
    """Told of every boundary between two passes, on every rank, with equal numbers."""

    async def step(self, number: int) -> object:
        """Stand at the boundary before pass ``number``, which is 1 for the first."""
        ...

    def idle(self) -> AbstractAsyncContextManager[object]:
        """Surround a time without passes, which begins and ends on all ranks between the same two."""
        ...


class NoUpdates:
    """Keeps the placement that there is."""

    async def step(self, number: int) -> None:
        """Do nothing."""

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Do nothing."""
        yield


class BlockingUpdates(NoUpdates):
    """Updates while no pass runs: the usual way, which the background one is compared with.

    :param choose: returns the placement to update to, the same on all ranks
    :param every: passes between two updates
    :param on_update: told of each
    """

    def __init__(
        self,
        updater: ExpertUpdater,
        choose: Callable[[], ExpertPlacement],
        *,
        every: int,
        on_update: Callable[[UpdateSummary], None] = lambda _: None,
    ) -> None:
        self._updater = updater
        self._choose = choose
        self._every = every
        self._on_update = on_update

    async def step(self, number: int) -> None:
        """Update if it is time to."""
        if number % self._every == 0:
            self._on_update(await self._updater.update(self._choose()))
