"""What happens between two forward passes. The engine knows this seam only."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol


class StepBoundary(Protocol):
    """Told of every boundary between two passes, on every rank, with equal numbers. An ``ExpertUpdater`` is one."""

    async def step(self, number: int, /) -> object:
        """Stand at the boundary before pass ``number``, which is 1 for the first."""
        ...

    def idle(self) -> AbstractAsyncContextManager[object]:
        """Surround a time without passes, which begins and ends on all ranks between the same two."""
        ...


class NoUpdates:
    """Keeps the placement that there is."""

    async def step(self, number: int, /) -> None:
        """Do nothing."""

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Do nothing."""
        yield
