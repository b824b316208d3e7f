"""One update on its way: layers stream through plan, transfer and commit at once.

::

    plan      N+3 ──(0 slots)──┐
    load      N+2 ──(0 slots)──┤ staging pool: backpressure
    launch    N+1 ──(0 slots)──┤ so that the device begins it when N has arrived
    transfer               N ──┤
    relay                  N ──┤ what crossed nodes once is passed on, while N+1 is being transferred
    agree                  N ──┤ control rounds, likewise
    commit               N-1 ──┘ at an agreed step boundary; in the exclusive mode at once

An update runs in a task of its own, shielded: its caller may be cancelled at any time, but a posted exchange has
another side. A cancellation becomes a ballot, and the update ends at the same layer on every rank.
"""

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from itertools import count

from anyio import BrokenResourceError, CancelScope, Event, create_memory_object_stream, create_task_group, move_on_after
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import Driver, until_step
from async_eplb.device import DeviceEvent
from async_eplb.errors import (
    BrokenControlGroup,
    BrokenTransport,
    CommitFailed,
    GenerationMismatch,
    UpdateAborted,
    UpdateCancelled,
    UpdateNotBegun,
    UpdateStalled,
)
from async_eplb.events.schema import LayerCommitted, UpdateFailed, UpdateFinished
from async_eplb.events.stopwatch import Stopwatch
from async_eplb.placement import ExpertPlacement
from async_eplb.staging import BufferState, StagingPool
from async_eplb.transport.base import PreparedExchange
from async_eplb.update.stages import LayerInFlight, LayerStages, PlannedLayer
from async_eplb.update.summary import UpdateSummary
from async_eplb.update.watchdog import Watchdog
from async_eplb.workers import News, Workers

_COPYING = "copying"
_FOR_A_STEP = "waiting for a step"


class UpdateRun:
    """One update on its way through the stages.

    :param target: the new placement
    :param rows: layers that change, in update order
    :param begin_timeout_s: how long the other ranks may take to begin it
    :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each step at most
    :param progress_timeout_s: how long a stage may do one thing
    :param on_layer: called for each layer when its commit is enqueued, in the thread that did so
    :param on_commit: called for each layer when its commit has finished on the device
    :param on_finish: called at the end, whatever it is
    """

    def __init__(
        self,
        *,
        stages: LayerStages,
        target: ExpertPlacement,
        rows: tuple[int, ...],
        digest: int,
        driver: Driver,
        news: News,
        pool: StagingPool,
        workers: Workers,
        begin_timeout_s: float,
        max_nbytes_per_step: int | None,
        progress_timeout_s: float,
        on_layer: Callable[[int], None],
        on_commit: Callable[[LayerCommitted], None],
        on_finish: Callable[["UpdateRun"], None],
    ) -> None:
        self.stages = stages
        self.target = target
        self.rows = rows
        self.generation = driver.generation + 1
        self.committed: list[int] = []
        """Layers that are new here, in update order."""
        self.error: Exception | None = None
        self.finished = Event()
        self.duration_ms = 0.0
        self._digest = digest
        self._driver = driver
        self._news = news
        self._pool = pool
        self._workers = workers
        self._begin_timeout_s = begin_timeout_s
        self._max_nbytes_per_step = max_nbytes_per_step
        self._watchdog = Watchdog(progress_timeout_s)
        self._paced_until = 0
        self._on_layer = on_layer
        self._on_commit = on_commit
        self._on_finish = on_finish
        self._prepared = False
        self._cancel_early = False
        self._launchable: list[tuple[LayerInFlight, int, PreparedExchange]] = []
        self._num_launched = 0
        self._num_planned = 0
        self._staged: list[LayerInFlight] = []
        self._num_finished = 0
        self._copy_failed = False
        self.kept: tuple[LayerInFlight, ...] = ()
        """After a failure: layers that are staged and not committed here, which a peer may have committed."""
        self._num_agreed = 0

    @property
    def owed(self) -> tuple[int, ...]:
        """After a failure: layers that were agreed on and are not committed here."""
        return self.rows[len(self.committed) : self._num_agreed]

    @property
    def broke(self) -> bool:
        """Whether the update failed in a way after which this rank and its peers cannot go on together."""
        if self.error is None or isinstance(self.error, UpdateCancelled):
            return False
        lost = isinstance(self.error, BrokenControlGroup | GenerationMismatch | UpdateNotBegun)
        return self._driver.begun or lost

    def fail(self, error: Exception) -> None:
        """End the update here, whatever other ranks do."""
        self._fail(error, alone=True)

    def cancel(self) -> None:
        """Ask all ranks to end the update after the layers that may already be under way."""
        self._cancel_early = True
        if self._prepared:
            self._driver.cancel()

    def execute(self, decision: Decision, *, step: int) -> Exception | None:
        """Do what was agreed: commit layers, then launch transfers. Does not block, and is never called twice at once.

        :param step: the boundary; 0 in the exclusive mode
        :returns: what went wrong with a commit, which the serving thread must know; the update has then failed
        """
        failure: Exception | None = None
        while len(self.committed) < decision.committed and not self._copy_failed:
            layer = self._staged[len(self.committed)]
            try:
                self.stages.copy(layer, step=step)
            except Exception as error:  # noqa: BLE001 - returned, and told to the other ranks
                failure = self._tear(error, layer.planned.row, step)
                break
            self.committed.append(layer.planned.row)
            try:
                self._on_layer(layer.planned.row)
            except Exception as error:  # noqa: BLE001 - likewise; what was agreed is committed all the same
                failure = failure or error
        if failure is not None:
            self._fail(failure)
        try:
            while self._num_launched < decision.launched and self.error is None:
                self.stages.launch(*self._launchable[self._num_launched])
                self._num_launched += 1
        except Exception as error:  # noqa: BLE001 - the update fails, serving does not
            self._fail(error)
        return failure

    def tear(self, cause: Exception) -> None:
        """Fail because what was agreed could not be done here, such as when the device failed."""
        row = self.rows[min(len(self.committed), len(self.rows) - 1)]
        self._fail(self._tear(cause, row, 0))

    def execute_beside(self, decision: Decision, *, step: int, after: DeviceEvent) -> None:
        """Do the same while the model stands still: on the commit stream, until the device has done it."""
        with self.stages.beside(after):
            self.execute(decision, step=step)

    async def run(self) -> None:
        """Run the update to its end; the outcome is in :attr:`error` and :attr:`committed`."""
        watch = Stopwatch()
        with CancelScope(shield=True):
            await self._begin()
            planned_in, planned_out = create_memory_object_stream[PlannedLayer](0)
            loaded_in, loaded_out = create_memory_object_stream[LayerInFlight](0)
            launched_in, launched_out = create_memory_object_stream[LayerInFlight](0)
            arrived_in, arrived_out = create_memory_object_stream[LayerInFlight](0)
            with (
                planned_in,
                planned_out,
                loaded_in,
                loaded_out,
                launched_in,
                launched_out,
                arrived_in,
                arrived_out,
            ):
                async with create_task_group() as tasks:
                    tasks.start_soon(self._guard, lambda: self._plan(planned_in))
                    tasks.start_soon(self._guard, lambda: self._load(planned_out, loaded_in))
                    tasks.start_soon(self._guard, lambda: self._launch(loaded_out, launched_in))
                    tasks.start_soon(self._guard, lambda: self._transfer(launched_out, arrived_in))
                    tasks.start_soon(self._guard, lambda: self._relay(arrived_out))
                    tasks.start_soon(self._guard, self._commit)
                    tasks.start_soon(self._guard, self._watch)
                    await self._guard(self._until_begun)
                    await self._news.until(lambda: self._driver.over)
                    self._heed()
                    await self._news.until(self._drained)
                    tasks.cancel_scope.cancel()
            await self.stages.settle()
        self.duration_ms = watch.ms()
        self._conclude()
        try:
            self._on_finish(self)
        except Exception as error:  # noqa: BLE001 - raised to the caller, whose logger it probably was
            self.error = self.error or error
        finally:
            self.finished.set()

    async def _begin(self) -> None:
        """Make staging large enough, and say that this rank has begun."""
        try:
            await self.stages.prepare(self._pool, self.rows)
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of it
            self.error = error
        self._driver.begin(
            self.stages.mode,
            digest=self._digest,
            total=len(self.rows),
            window=len(self._pool.buffers),
            failed=self.error is not None,
        )
        self._prepared = True
        if self._cancel_early:
            self._driver.cancel()

    async def _until_begun(self) -> None:
        with move_on_after(self._begin_timeout_s) as limit:
            await self._news.until(lambda: self._driver.begun or self._driver.over)
        if limit.cancelled_caught and not self._driver.begun:
            missing = self._driver.waiting_for
            self._fail(
                UpdateNotBegun(
                    f"ranks {list(missing)} did not begin update {self.generation} within {self._begin_timeout_s} s",
                    generation=self.generation,
                    ranks=missing,
                    timeout_s=self._begin_timeout_s,
                ),
                alone=True,
            )
        if self._driver.begun and self.error is None:
            self.stages.log_start(self._pool, self.rows)

    async def _watch(self) -> None:
        """Fail whenever a stage makes no progress, and say what all of them do."""
        while True:
            stalled = await self._watchdog.until_stalled()
            waits = stalled.stage == "agree" and stalled.doing != _FOR_A_STEP
            behind = self._driver.behind(stalled.index + 1) if waits else ()
            error = UpdateStalled(
                f"rank {self.stages.rank}, layer {self.rows[stalled.index]}: {stalled.stage} has made no progress for "
                f"{self._watchdog.timeout_s} s while {stalled.doing}; ranks that have not staged it: {list(behind)}",
                layer=self.rows[stalled.index],
                stage=stalled.stage,
                doing=stalled.doing,
                timeout_s=self._watchdog.timeout_s,
                waiting_for=behind,
            )
            if stalled.doing == _FOR_A_STEP:
                if not self._driver.hold_before(stalled.index, error):
                    self._news.notify()  # a step has come, and copies the layer now
                    continue
                self._copy_failed = True  # peers commit the layer; here no step comes, and none may any more
            activities, ballots = self._watchdog.activities, self._driver.ballots
            self._fail(error)
            try:
                self.stages.log_stall(error, activities, self._pool, ballots)
            except Exception as unlogged:  # noqa: BLE001 - whatever the caller's logger raises, other stages are watched
                error.add_note(f"the event could not be logged: {unlogged!r}")

    async def _guard(self, stage: Callable[[], Awaitable[None]]) -> None:
        try:
            await stage()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            self._fail(error)

    def _fail(self, error: Exception, *, alone: bool = False) -> None:
        if self.error is None:
            self.error = error
        if self._driver.begun:
            self.stages.abort()
        self._driver.fail(alone=alone)

    async def _plan(self, planned: MemoryObjectSendStream[PlannedLayer]) -> None:
        with planned:
            for index, row in enumerate(self.rows):
                if index >= self._driver.limit or self.error is not None:
                    return
                with self._watchdog.doing("plan", index, "planning"):
                    layer = await self.stages.plan(row)
                self._num_planned += 1
                try:
                    await planned.send(layer)
                except BrokenResourceError:
                    return

    async def _load(
        self, planned: MemoryObjectReceiveStream[PlannedLayer], loaded: MemoryObjectSendStream[LayerInFlight]
    ) -> None:
        """Prepare each layer's transfer while the one before is under way, and offer it to the other ranks."""
        driver = self._driver
        await self._news.until(lambda: driver.begun)
        with planned, loaded:
            index = 0
            async for planned_layer in planned:
                buffer = await self._pool.acquire()
                await self._keep_pace(planned_layer)
                if index >= driver.limit or driver.over:
                    return
                with self._watchdog.doing("transfer", index, "copying own slots"):
                    layer = await self.stages.load(planned_layer, buffer)
                if self._launches_at_steps:
                    self._launchable += [(layer, hop, part) for hop, part in layer.parts]
                    driver.offer(len(layer.parts))
                elif self.stages.launch_rule.needs_grant:
                    driver.offer(1)
                try:
                    await loaded.send(layer)
                except BrokenResourceError:
                    return
                index += 1

    async def _launch(
        self, loaded: MemoryObjectReceiveStream[LayerInFlight], launched: MemoryObjectSendStream[LayerInFlight]
    ) -> None:
        """Start each layer's transfer, the next one while one is under way: the device need not wait for this."""
        with loaded, launched:
            index = 0
            async for layer in loaded:
                with self._watchdog.doing("transfer", index, "waiting for its launch"):
                    if not await self._is_launched(layer, index):
                        return
                with self._watchdog.doing("transfer", index, "starting"):
                    await self.stages.start(layer)
                try:
                    await launched.send(layer)
                except BrokenResourceError:
                    return
                index += 1

    async def _transfer(
        self, launched: MemoryObjectReceiveStream[LayerInFlight], arrived: MemoryObjectSendStream[LayerInFlight]
    ) -> None:
        with launched, arrived:
            index = 0
            async for layer in launched:
                with self._watchdog.doing("transfer", index, "receiving"):
                    await self.stages.receive(layer, 0)
                try:
                    await arrived.send(layer)
                except BrokenResourceError:
                    return
                index += 1

    async def _relay(self, arrived: MemoryObjectReceiveStream[LayerInFlight]) -> None:
        """Follow each layer's second hop, if it has one, until the layer is staged; its launch is agreed already."""
        with arrived:
            async for layer in arrived:
                index = len(self._staged)
                for hop in range(1, len(layer.hops)):
                    with self._watchdog.doing("relay", index, "waiting for its launch"):
                        if self._launches_at_steps:
                            await self._news.until(partial(layer.is_launched, hop))
                    with self._watchdog.doing("relay", index, "receiving"):
                        await self.stages.receive(layer, hop)
                with self._watchdog.doing("relay", index, "checking"):
                    await self.stages.stage(layer)
                self._staged.append(layer)
                self._driver.advance(staged=1)
                self._news.notify()

    @property
    def _launches_at_steps(self) -> bool:
        """Whether transfers begin at agreed boundaries, on the serving thread."""
        return self.stages.launches_at_steps

    async def _is_launched(self, layer: LayerInFlight, index: int) -> bool:
        """Launch a layer, or see it launched; return whether that was, or False if it will not be moved."""
        driver = self._driver
        layer.watch = Stopwatch()
        if self._launches_at_steps:
            await self._news.until(lambda: layer.is_launched(0) or index >= driver.limit)
            return layer.is_launched(0)
        if self.stages.launch_rule.needs_grant:
            await self._news.until(lambda: driver.launched > index or index >= driver.limit)
            if driver.launched <= index:
                return False
        elif index >= driver.limit or driver.over:
            return False
        await self.stages.launch_from_background(layer)
        return True

    async def _keep_pace(self, layer: PlannedLayer) -> None:
        """Wait for as many steps as the layers before may take; all ranks count the same bytes."""
        if self._max_nbytes_per_step is None:
            return
        driver = self._driver
        await until_step(driver, self._news, self._paced_until, unless=lambda: driver.standing or driver.over)
        self._paced_until = driver.step + -(-layer.peak_nbytes // self._max_nbytes_per_step)

    async def _commit(self) -> None:
        """Follow each layer from when it is staged until the device has committed it, also after a failure."""
        for index in count():
            await self._news.until(lambda index=index: len(self._staged) > index)  # type: ignore[misc]
            with self._watchdog.doing("agree", index, "waiting for all ranks"):
                await self._news.until(lambda index=index: self._driver.agreed > index)  # type: ignore[misc]
            watch = await self._copied(index)
            if len(self.committed) <= index:
                return
            layer = self._staged[index]
            with self._watchdog.doing("commit", index, "waiting for the device"):
                try:
                    committed = await self.stages.finish(layer, watch)
                    self._on_commit(committed)
                except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
                    self._fail(error)
            self._pool.release(layer.buffer)
            self._num_finished += 1
            self._driver.advance(committed=1)
            self._news.notify()  # no round follows that would, if a rank is lost

    async def _copied(self, index: int) -> Stopwatch:
        """Return when an agreed layer is copied, or will never be; with the time since its commit began."""
        watch = Stopwatch()
        if self.stages.mode is Mode.EXCLUSIVE:
            with self._watchdog.doing("commit", index, _COPYING):
                await self._copy_beside(index + 1)
            return watch
        with self._watchdog.doing("agree", index, _FOR_A_STEP):
            await self._news.until(lambda: self._driver.taken > index or self._copy_failed)
        with self._watchdog.doing("commit", index, _COPYING):
            await self._news.until(lambda: len(self.committed) > index or self._copy_failed)
        return Stopwatch(self._staged[index].copy_ms)

    async def _copy_beside(self, up_to: int) -> None:
        decision = Decision(boundary=0, committed=up_to, launched=0)
        execute = partial(self.execute_beside, decision, step=0, after=self.stages.callers_work)
        try:
            await self._workers.run("commit", execute)
        except Exception as error:  # noqa: BLE001 - likewise
            self.tear(error)

    def _tear(self, cause: Exception, row: int, step: int) -> CommitFailed:
        """Hold this rank: peers have committed the layer, and it cannot."""
        self._copy_failed = True
        error = CommitFailed(
            f"rank {self.stages.rank}: layer {row} was agreed on and could not be copied ({cause}); this rank must not "
            "serve before recover(), which copies it anew",
            rank=self.stages.rank,
            layer=row,
            step=step,
        )
        error.__cause__ = cause
        self._driver.hold(error)
        return error

    def _drained(self) -> bool:
        """Whether all that was agreed is done here, or never will be because a copy failed."""
        return self._num_finished >= self._driver.agreed or self._copy_failed

    def _heed(self) -> None:
        """Take over what ended the update."""
        driver = self._driver
        if self.error is None:
            self.error = driver.error or driver.lost
        if driver.lost is not None and isinstance(self.error, BrokenTransport):
            driver.lost.__context__ = self.error  # an exchange broke because its peer is gone
            self.error = driver.lost
        if self.error is None and driver.failed_by:
            self.error = UpdateAborted(
                f"ranks {list(driver.failed_by)} failed; see their errors", ranks=driver.failed_by
            )
        if self.error is None and driver.left:
            self.error = UpdateAborted(f"ranks {list(driver.left)} have left", ranks=driver.left)
        if self.error is not None and driver.begun:
            self.stages.abort()

    def _conclude(self) -> None:
        self.kept = tuple(self._staged[len(self.committed) :]) if self.broke else ()
        self._num_agreed = self._driver.agreed
        kept = [layer.buffer for layer in self.kept]
        for buffer in self._pool.buffers:
            if buffer.state is not BufferState.FREE and buffer not in kept:
                self._pool.release(buffer)
        if self.error is None and self._driver.limit < len(self.rows):
            ranks = self._driver.cancelled_by
            self.error = UpdateCancelled(
                f"ranks {list(ranks)} cancelled the update after {len(self.committed)} of {len(self.rows)} layers",
                ranks=ranks,
            )
        if self.error is not None:
            self.error.add_note(f"layers committed before: {self.committed}; all others are as they were")
            self._describe(self.error)
        self._driver.end(broken=self.broke)

    def _describe(self, error: Exception) -> None:
        """Say which layer was under way, and how far it was, when the update ended."""
        index = len(self.committed)
        stages = (
            ("commit", self._driver.agreed > index),
            ("fence", self._driver.in_doubt),
            ("staged", len(self._staged) > index),
            ("transfer", self._num_planned > index),
            ("planning", index < len(self.rows)),
        )
        error.__dict__["committed_layers"] = tuple(self.committed)
        error.__dict__["layer_under_way"] = (*self.rows, -1)[index]
        error.__dict__["phase"] = next((phase for phase, holds in stages if holds), "")

    async def roll_forward(self, rows: Collection[int]) -> None:
        """Commit those of ``rows`` whose staging was kept, and give all kept staging back.

        :raises CommitFailed: if a layer cannot be copied; its staging is kept for another try
        """
        while self.kept:
            layer = self.kept[0]
            if layer.planned.row in rows:
                try:
                    await self._workers.run("commit", partial(self._copy_kept, layer))
                except Exception as error:
                    raise self._tear(error, layer.planned.row, 0) from error
                await self.stages.finish(layer, Stopwatch())
            self._pool.release(layer.buffer)
            self.kept = self.kept[1:]

    def _copy_kept(self, layer: LayerInFlight) -> None:
        with self.stages.beside(self.stages.callers_work):
            self.stages.copy(layer, step=0)
            self.committed.append(layer.planned.row)
            self._on_layer(layer.planned.row)

    def summary(self) -> UpdateSummary:
        """Return what the update did.

        :raises Exception: what ended it early
        """
        if self.error is not None:
            raise self.error
        tally = self.stages.tally
        return UpdateSummary(
            generation=self.generation,
            layers=self.rows,
            num_unchanged_layers=self.target.num_layers - len(self.rows),
            duration_ms=self.duration_ms,
            overlap=tally.overlap(self.duration_ms),
            nbytes_by_source=dict(tally.nbytes_by_source),
            **tally.numbers(),
        )

    def ending(self) -> UpdateFinished | UpdateFailed:
        """Return what the log says of the end of the update."""
        if self.error is not None:
            return UpdateFailed(
                generation=self.generation,
                rank=self.stages.rank,
                step=self.stages.step(),
                duration_ms=self.duration_ms,
                error=type(self.error).__name__,
                error_message=str(self.error),
                committed_layers=self.committed,
            )
        tally = self.stages.tally
        return UpdateFinished(
            generation=self.generation,
            rank=self.stages.rank,
            step=self.stages.step(),
            num_layers=len(self.rows),
            duration_ms=self.duration_ms,
            overlap=tally.overlap(self.duration_ms),
            **tally.numbers(),
        )
