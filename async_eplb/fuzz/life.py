"""What one simulated rank does: update alone or beside serving, then recover and update again, until all is well."""

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

_COLLECTIVE_TIMEOUT_S = 30.0
"""How long a model's collective waits for a rank."""

FAILURES = (EplbError, OSError, MemoryError)
"""What a caller may meet with: this package's errors, and those that the machine raised in what the caller called."""


class PassBroken(Exception):
    """A pass cannot be finished: a rank does not take part in its collectives."""


class Collectives:
    """What ranks that serve do together in each pass."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._arrived: dict[int, set[int]] = {}
        self._complete: dict[int, Event] = {}
        self._all_done: dict[int, bool] = {}
        self._broken = False

    def break_off(self) -> None:
        """Fail all passes, those to come too."""
        self._broken = True
        for event in self._complete.values():
            event.set()

    async def meet(self, number: int, rank: int, *, done: bool) -> bool:
        """Wait for all ranks in a pass; return whether all are done.

        :raises PassBroken: if one does not come
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
            self.break_off()
            raise PassBroken(f"rank {rank}, pass {number}: only ranks {sorted(arrived)} came")
        return self._all_done[number]


@dataclass(slots=True, eq=False)
class Rank:
    """One rank of the world, and what the world tells it.

    :param settled: it has nothing left to do, well or ill, until it is told how to go on
    :param cancel: cancels what its caller waits for, if it can be cancelled now
    :param cancel_natively: the same by asyncio's own means
    """

    watched: Watched
    updater: ExpertUpdater
    transport: MemoryTransport
    settled: bool = False
    failure: Exception | None = None
    excluded: bool = False
    cancel: Callable[[], None] | None = None
    cancel_natively: Callable[[], object] | None = None
    life: CancelScope = field(default_factory=CancelScope)
    left: bool = False
    go_on: Event = field(default_factory=Event)
    placement: ExpertPlacement | None = None

    @property
    def number(self) -> int:
        """Its number."""
        return self.watched.rank

    def tell(self, transport: MemoryTransport, placement: ExpertPlacement | None) -> None:
        """Let it recover over a transport, then move to a placement, if there is one."""
        self.settled, self.failure = False, None
        self.transport, self.placement = transport, placement
        self.go_on.set()
        self.go_on = Event()


class Life:
    """What a rank does.

    :param placements: to move to, one after another
    :param tell: says that something has changed that others wait for
    """

    def __init__(
        self,
        scenario: Scenario,
        rank: Rank,
        placements: Sequence[ExpertPlacement],
        *,
        checker: Checker,
        collectives: Collectives,
        source: TinyModel,
        tell: Callable[[], None],
    ) -> None:
        self._scenario = scenario
        self._rank = rank
        self._placements = placements
        self._checker = checker
        self._collectives = collectives
        self._source = source
        self._tell = tell
        self._random = random.Random(scenario.seed * 17 + rank.number)  # noqa: S311 - repeatable

    async def live(self) -> None:
        """Be the rank, from entering the updater to leaving it."""
        rank = self._rank
        try:
            async with rank.updater:
                with rank.life:
                    await self._settle(self._serve if self._scenario.serving else self._update)
                    while not rank.excluded:
                        await self._settle(self._recover)
        except FAILURES as error:
            rank.failure = rank.failure or error
        rank.left = rank.watched.gone = rank.settled = True
        self._collectives.break_off()
        self._tell()

    async def _settle(self, live: Callable[[], Awaitable[None]]) -> None:
        rank, go_on = self._rank, self._rank.go_on
        try:
            await live()
        except (*FAILURES, PassBroken) as error:
            rank.failure = rank.failure or error
        if rank.failure is not None:
            self._collectives.break_off()
        rank.settled = True
        self._tell()
        await go_on.wait()

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
            await self._update_to(placement)

    async def _update_to(self, placement: ExpertPlacement) -> None:
        """Update alone; a caller that goes away, in either way, is followed by another."""
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
        if failed is not None and failed.error is not None:  # a caller that went away has not heard of it
            raise failed.error

    async def _serve(self) -> None:
        """Make passes until all ranks have done all updates."""
        rank, done = self._rank, Event()
        async with create_task_group() as tasks:
            tasks.start_soon(self._update_beside, done)
            try:
                await self._make_passes(done)
            except (*FAILURES, PassBroken) as error:
                rank.failure = rank.failure or error
                self._collectives.break_off()
                tasks.cancel_scope.cancel()  # nobody waits for an update that no step follows
            finally:
                rank.watched.serving = False

    async def _update_beside(self, done: Event) -> None:
        rank = self._rank
        try:
            for placement in self._placements:
                await anyio.sleep(self._random.uniform(0, 0.1))
                handle = rank.updater.begin(placement)
                rank.cancel = handle.cancel
                with suppress(UpdateCancelled):
                    await handle.wait()
        except FAILURES as error:
            rank.failure = rank.failure or error
        finally:
            rank.cancel = None
            done.set()

    async def _make_passes(self, done: Event) -> None:
        rank, every, number = self._rank, self._scenario.idle_every, 0
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
                    await rank.updater.step(number if self._scenario.numbered else None)
                    passed = True
            self._checker.passes(rank.watched, number)
            rank.watched.serving = True
            await anyio.sleep(self._random.choice((0.001, 0.002, 0.01, 0.03)))
            if await self._collectives.meet(number, rank.number, done=done.is_set()):
                return
            await checkpoint()

    def _natively(self) -> "_Natively":
        return _Natively(self._rank)


class _Natively:
    """Inside, the task can be cancelled by asyncio itself, once; it goes on after the body."""

    def __init__(self, rank: Rank) -> None:
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
