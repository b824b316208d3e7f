"""What happens between two forward passes: nothing, or an update that everything waits for.

The engine knows this seam only. ``async_eplb.ExpertUpdater`` has the same two methods, and moves experts while passes
go on.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import anyio
from torch.distributed import ProcessGroup

from async_eplb import ExpertPlacement, ExpertUpdater
from serving.exchange import gather_rows


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """When an update was under way, on this machine's monotonic clock, and how many layers it changed."""

    begun_s: float
    ended_s: float
    num_layers: int


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

    def __init__(self) -> None:
        self.updates: list[UpdateRecord] = []
        """What was done, in order."""

    def request(self) -> None:
        """Do nothing."""

    async def step(self, number: int) -> None:
        """Do nothing."""

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Do nothing."""
        yield


class BlockingUpdates(NoUpdates):
    """Updates while no pass runs: the usual way, which the background one is compared with.

    :param group: the model's group of CPUs, on which ranks ask each other at each boundary whether to update
    :param choose: returns the placement to update to, the same on all ranks; blocks
    :param every: passes between two updates; only on request without it
    """

    def __init__(
        self,
        updater: ExpertUpdater,
        group: ProcessGroup,
        choose: Callable[[], ExpertPlacement],
        *,
        every: int = 0,
    ) -> None:
        super().__init__()
        self._updater = updater
        self._group = group
        self._choose = choose
        self._every = every
        self._num_requested = 0

    def request(self) -> None:
        """Update at the first boundary that all ranks have been asked before."""
        self._num_requested += 1

    async def step(self, number: int) -> None:
        """Update if it is time to."""
        if self._every and number % self._every == 0:
            self.request()
        requested = await anyio.to_thread.run_sync(gather_rows, self._group, [self._num_requested])
        if min(requested)[0] <= len(self.updates):
            return
        begun_s = time.monotonic()
        placement = await anyio.to_thread.run_sync(self._choose)
        summary = await self._updater.update(placement)
        self.updates.append(UpdateRecord(begun_s, time.monotonic(), len(summary.layers)))
