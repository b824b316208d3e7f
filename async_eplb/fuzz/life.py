"""The program of one simulated rank: update, alone or beside serving; then recover and update again, as directed."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio import CancelScope, Event, create_task_group
from anyio.lowlevel import checkpoint

from async_eplb.errors import EplbError, UpdateCancelled
from async_eplb.fuzz.invariants import Checker, Watched
from async_eplb.fuzz.model import TinyModel
from async_eplb.fuzz.scenario import Scenario
from async_eplb.placement import ExpertPlacement
from async_eplb.transport.memory.transport import MemoryTransport
from async_eplb.updater import ExpertUpdater

PAUSE_S = 30.0
"""How long traffic pauses: several times the time-out of progress."""
_COLLECTIVE_TIMEOUT_S = 30.0
"""How long the model's collectives wait for a rank."""

FAILURES = (EplbError, OSError, MemoryError)
"""Errors that a caller may get: this package's, and those that the simulated machine raises."""


class PassBroken(Exception):
    """A forward pass cannot be finished: a rank does not take part in its collectives."""


class Collectives:
    """Stands for the model's collectives: in each forward pass, serving ranks wait for each other."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._arrived: dict[int, set[int]] = {}
        self._complete: dict[int, Event] = {}
        self._all_done: dict[int, bool] = {}
        self._broken = False

    def fail_all(self) -> None:
        """Fail all passes under way, and all later ones."""
        self._broken = True
        for event in self._complete.values():
            event.set()

    async def meet(self, number: int, rank: int, *, done: bool) -> bool:
        """Wait for all ranks in a pass; return whether all of them are done with their updates.

        :raises PassBroken: if one does not come in time
        """
        arrived = self._arrived.setdefault(number, set())
        complete = self._complete.setdefault(number, Event())
        arrived.add(rank)
        self._all_done[number] = self._all_done.get(number, True) and done
        if len(arrived) == self._num_ranks:
            complete.set()
        if not self._broken:
            with anyio.move_on_after(_COLLECTIVE_TIMEOUT_S):
                await complete.wait()
        if len(arrived) < self._num_ranks:
            self.fail_all()
            raise PassBroken(f"rank {rank}, pass {number}: only ranks {sorted(arrived)} came")
        return self._all_done[number]


@dataclass(slots=True, eq=False)
class SimulatedRank:
    """State of one rank that the world reads, and by which it directs the rank.

    :param settled: its updates have ended, well or not, and it waits until it is resumed
    :param failure: the first error since it was last resumed
    :param num_failures: updates that have failed
    :param excluded: the world directs it no more
    :param cancel: cancels the update that its caller waits for; None if there is none
    :param cancel_natively: cancels the task that waits, by asyncio's own means
    :param life: is cancelled to make it leave its updater
    :param resumed: is set when :meth:`resume` is called, and when it is excluded
    :param placement: where to move to after a recovery
    """

    watched: Watched
    updater: ExpertUpdater
    transport: MemoryTransport
    settled: bool = False
    failure: Exception | None = None
    num_failures: int = 0
    excluded: bool = False
    cancel: Callable[[], None] | None = None
    cancel_natively: Callable[[], object] | None = None
    life: CancelScope = field(default_factory=CancelScope)
    resumed: Event = field(default_factory=Event)
    placement: ExpertPlacement | None = None

    @property
    def number(self) -> int:
        """Number of the rank."""
        return self.watched.rank

    def resume(self, transport: MemoryTransport, placement: ExpertPlacement | None) -> None:
        """Let the rank recover over a transport, then move to a placement unless that is None."""
        self.settled, self.failure = False, None
        self.transport, self.placement = transport, placement
        self.resumed.set()
        self.resumed = Event()


class Life:
    """The program of a rank.

    :param placements: to move to, one after another
    :param source: of experts that no rank has after a loss
    :param notify: called when the rank has settled
    """

    def __init__(
        self,
        scenario: Scenario,
        rank: SimulatedRank,
        placements: Sequence[ExpertPlacement],
        *,
        checker: Checker,
        collectives: Collectives,
        source: TinyModel,
        notify: Callable[[], None],
    ) -> None:
        self._scenario = scenario
        self._rank = rank
        self._placements = placements
        self._checker = checker
        self._collectives = collectives
        self._source = source
        self._notify = notify
        self._random = random.Random(scenario.seed * 17 + rank.number)  # noqa: S311 - repeatable

    async def live(self) -> None:
        """Run the rank from entering its updater to leaving it."""
        rank = self._rank
        try:
            async with rank.updater:
                with rank.life:
                    await self._settle(self._serve if self._scenario.serving else self._update)
                    while not rank.excluded:
                        await self._settle(self._recover)
        except FAILURES as error:
            rank.failure = rank.failure or error
        rank.watched.gone = rank.settled = True
        self._collectives.fail_all()
        self._notify()

    async def _settle(self, live: Callable[[], Awaitable[None]]) -> None:
        rank, resumed = self._rank, self._rank.resumed
        try:
            await live()
        except (*FAILURES, PassBroken) as error:
            rank.failure = rank.failure or error
        if rank.failure is not None:
            self._collectives.fail_all()
        rank.settled = True
        self._notify()
        await resumed.wait()

    async def _recover(self) -> None:
        rank = self._rank
        if rank.excluded:
            return
        rank.watched.recovering, rank.watched.serving = True, False
        await rank.updater.recover(rank.transport, source=self._source)
        rank.watched.recovering = False
        if rank.placement is not None:
            self._checker.check_replicas(rank.watched)
            await self._update_to(rank.placement)

    async def _update(self) -> None:
        for placement in self._placements:
            try:
                await self._update_to(placement)
            except EplbError:
                if not self._goes_on():
                    raise

    def _goes_on(self) -> bool:
        """Return whether the next update is begun after one that failed."""
        self._rank.num_failures += 1
        return self._scenario.goes_on and not self._rank.updater.closed

    async def _update_to(self, placement: ExpertPlacement) -> None:
        """Update without serving, and wait for the end of the update even if the caller was cancelled."""
        rank = self._rank
        with CancelScope() as scope, self._natively(), suppress(UpdateCancelled):
            rank.cancel = scope.cancel
            try:
                await rank.updater.update(placement)
            finally:
                rank.cancel = None
        run = rank.updater.running
        if run is not None:  # a second cancellation ends the wait, not the update
            await run.finished.wait()
        failed = rank.updater.failed
        if failed is not None and failed.error is not None:  # a cancelled caller did not get it
            raise failed.error

    async def _serve(self) -> None:
        """Make forward passes, with updates beside them, until all ranks have made all updates."""
        rank, done = self._rank, Event()
        async with create_task_group() as tasks:
            tasks.start_soon(self._update_beside, done)
            try:
                await self._make_passes(done)
            except (*FAILURES, PassBroken) as error:
                rank.failure = rank.failure or error
                self._collectives.fail_all()
                tasks.cancel_scope.cancel()  # without further steps the update would never end
            finally:
                rank.watched.serving = False

    async def _update_beside(self, done: Event) -> None:
        rank = self._rank
        try:
            for placement in self._placements:
                await anyio.sleep(self._random.uniform(0, 0.1))
                handle = rank.updater.begin(placement)
                rank.cancel = handle.cancel
                try:
                    with suppress(UpdateCancelled):
                        await handle.wait()
                except EplbError:
                    if not self._goes_on():
                        raise
        except FAILURES as error:
            rank.failure = rank.failure or error
        finally:
            rank.cancel = None
            done.set()

    async def _make_passes(self, done: Event) -> None:
        rank, every, number = self._rank, self._scenario.traffic.idle_every, 0
        while True:
            number += 1
            rank.watched.serving = False
            if every and number % every == 0:
                async with rank.updater.idle():
                    await anyio.sleep(self._random.uniform(0, 0.2))
                await self._collectives.meet(-number, rank.number, done=False)
            passed = False
            while not passed:
                with self._natively():
                    await rank.updater.step(number if self._scenario.traffic.numbered else None)
                    passed = True
            self._checker.passes(rank.watched, number)
            rank.watched.serving = True
            await anyio.sleep(self._random.choice((0.001, 0.002, 0.01, 0.03)))
            if await self._collectives.meet(number, rank.number, done=done.is_set()):
                return
            if number == self._scenario.traffic.pause_after:
                rank.watched.serving = False
                await anyio.sleep(PAUSE_S)
            await checkpoint()

    def _natively(self) -> "_Natively":
        return _Natively(self._rank)


class _Natively:
    """Lets ``rank.cancel_natively`` cancel the task in the body, once; the task goes on after the body."""

    def __init__(self, rank: SimulatedRank) -> None:
        self._rank = rank
        self._task = asyncio.current_task()
        self._asked = False

    def __enter__(self) -> None:
        self._rank.cancel_natively = self._cancel

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._rank.cancel_natively = None
        if self._asked and self._task is not None:
            self._task.uncancel()
            return kind is asyncio.CancelledError
        return False

    def _cancel(self) -> None:
        if self._task is not None and not self._asked:
            self._asked = True
            self._task.cancel()
