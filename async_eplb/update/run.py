"""One update from its beginning to its end, whatever that is.

An update runs in a task of its own, shielded: its caller may be cancelled at any time, but a posted exchange has
another side. A cancellation becomes a ballot, and the update ends at the same layer on every rank (rule 9).
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from itertools import count

from anyio import CancelScope, Event, create_task_group, current_time, get_cancelled_exc_class, move_on_after

from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import UpdateCancelled, UpdateNotBegun, UpdateStalled
from async_eplb.events.schema import LayerCommitted
from async_eplb.staging import BufferState, StagingPool
from async_eplb.transport.base import Transport
from async_eplb.update.admission import Update
from async_eplb.update.boundary import Boundary
from async_eplb.update.journal import Journal
from async_eplb.update.layer import LayerInFlight
from async_eplb.update.outcome import Failure, needs_recovery
from async_eplb.update.pipeline import LayerPipeline
from async_eplb.update.progress import Progress
from async_eplb.update.rank import Rank
from async_eplb.update.stages import LayerStages
from async_eplb.update.summary import UpdateSummary
from async_eplb.update.watchdog import Activity, Doing, Watchdog


class UpdateRun:
    """One update of one rank. Made when it is admitted; :meth:`run` runs it.

    :param open_transport: opens the transport; None if it is open
    """

    def __init__(
        self,
        rank: Rank,
        update: Update,
        *,
        transport: Transport,
        shared: SharedAgreement,
        pool: StagingPool,
        open_transport: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.update = update
        self.pool = pool
        self.progress = Progress(update.rows)
        self.failure = Failure(shared, transport.abort)
        self.finished = Event()
        self.journal = Journal(rank, update, shared)
        self.kept: tuple[LayerInFlight, ...] = ()
        """After a failure: layers that are staged and not committed here, which a peer may have committed."""
        self.duration_ms = 0.0
        self._rank = rank
        self._shared = shared
        self._watchdog = Watchdog(rank.options.progress_timeout_s, self._steps)
        self._stages = LayerStages(rank, update, transport, self.journal)
        self.boundary = Boundary(rank, self._stages, self.progress, shared, self.failure)
        self._open_transport = open_transport
        self._cancelled = False

    @property
    def error(self) -> Exception | None:
        """What ended the update early."""
        return self.failure.error

    @property
    def needs_recovery(self) -> bool:
        """Whether this rank and its peers can go on together only after ``recover()``."""
        return needs_recovery(
            self.error, self._shared.faults, in_doubt=self._shared.in_doubt or self.progress.copy_failed
        )

    def cancel(self) -> None:
        """Ask all ranks to end the update after the layers that may already be under way."""
        self._cancelled = True
        if not self.finished.is_set():
            self._shared.cancel()  # without effect until this update has begun there

    async def run(self) -> None:
        """Run the update until nothing of it is under way; the outcome is in :attr:`failure` and :attr:`progress`."""
        began_s = current_time()
        with CancelScope(shield=True):
            await self._begin()
            with ExitStack() as streams:
                async with create_task_group() as tasks:
                    pipeline = self._pipeline()
                    pipeline.start(tasks, streams)
                    tasks.start_soon(pipeline.guarded, self._watch)
                    await pipeline.guarded(self._until_begun)
                    await self._shared.until(lambda: self._shared.outlook.over)
                    self.failure.conclude()
                    await self._shared.until(self._is_drained)
                    tasks.cancel_scope.cancel()
            await self._stages.settle()
        self.duration_ms = (current_time() - began_s) * 1e3
        self._conclude()

    async def join(self) -> None:
        """Wait for the end of the update; if this is cancelled, for the end of the cancelled update."""
        try:
            await self.finished.wait()
        except get_cancelled_exc_class():
            self.cancel()
            with CancelScope(shield=True):
                await self.finished.wait()
            raise

    async def landings(self) -> AsyncGenerator[LayerCommitted, None]:
        """Yield each layer as it lands on this rank; cancel the update if the generator is closed before its end."""
        landed = self.progress.landed
        try:
            for index in count():
                await self._shared.until(partial(self._has_landed, index))
                if len(landed) <= index:
                    break
                yield landed[index]
        finally:
            if not self.finished.is_set():
                self.cancel()
            await self.join()
        self.summary()

    def _has_landed(self, index: int) -> bool:
        return len(self.progress.landed) > index or self.finished.is_set()

    def log_end(self) -> None:
        """Log how the update ended."""
        self.journal.ended(self.error, self.progress.committed_rows, self.duration_ms)

    def summary(self) -> UpdateSummary:
        """Return what the update did.

        :raises Exception: what ended it early
        """
        if self.error is not None:
            raise self.error
        return self.journal.summary(self.duration_ms)

    def _pipeline(self) -> LayerPipeline:
        return LayerPipeline(
            self.update,
            self._stages,
            self.boundary,
            self.progress,
            self.failure,
            self._shared,
            self.pool,
            self._watchdog,
        )

    async def _begin(self) -> None:
        """Plan, and let the other ranks know that this one has begun."""
        try:
            if self._open_transport is not None:
                await self._open_transport()
            await self._stages.prepare()
        except Exception as error:  # noqa: BLE001 - the other ranks must get to know
            self.failure.error = error
        self._shared.begin(
            self.update.mode,
            digest=self.update.digest,
            total=len(self.update.rows),
            window=len(self.pool.buffers),
            failed=self.error is not None,
            generation=self.update.generation,
        )
        if self._cancelled:
            self._shared.cancel()

    async def _until_begun(self) -> None:
        """Wait until all ranks have begun, for two time-outs of a round: a round that is lost names its rank."""
        shared, timeout_s = self._shared, 2 * self._rank.options.control_timeout_s
        with move_on_after(timeout_s) as limit:
            await shared.until(lambda: shared.outlook.begun or shared.outlook.over)
        if limit.cancelled_caught and not shared.outlook.begun:
            missing = shared.faults.waiting_for
            number = self.update.generation
            self.failure.error = UpdateNotBegun(
                f"ranks {list(missing)} did not begin update {number} within {timeout_s} s",
                generation=number,
                ranks=missing,
                timeout_s=timeout_s,
            )
            shared.give_up()
        if shared.outlook.begun and self.error is None:
            self.journal.started(self.pool)

    async def _watch(self) -> None:
        """Fail whenever a stage makes no progress, and log what all of them do."""
        while True:
            activity = await self._watchdog.until_stalled()
            error = self._stalled(activity)
            if activity.doing is Doing.AWAIT_STEP and self._shared.faults.lost is not None:
                if not self._shared.hold(error, before=activity.index):
                    self._shared.news.notify()  # a step has come, and copies the layer now
                    continue
                self.progress.copy_failed = True  # peers commit the layer; here no step comes, and none may any more
            activities, ballots = self._watchdog.activities, self._shared.ballots
            self.failure.fail(error)
            self.journal.stalled(error, activities, self.pool, ballots)

    def _steps(self) -> object:
        """Return how far the ranks have come; None where nothing waits for steps, or no round tells of them."""
        shared = self._shared
        all_stand = bool(shared.ballots) and all(ballot.standing for ballot in shared.ballots)
        if self.update.mode is Mode.EXCLUSIVE or all_stand or shared.faults.lost is not None:
            return None
        return (shared.outlook.step, *(ballot.step for ballot in shared.ballots))

    def _stalled(self, activity: Activity) -> UpdateStalled:
        row, timeout_s = self.update.rows[activity.index], self._watchdog.timeout_s
        behind = self._shared.behind(activity.index + 1) if activity.doing is Doing.AWAIT_RANKS else ()
        return UpdateStalled(
            f"rank {self._rank.number}, layer {row}: {activity.stage} has made no progress for {timeout_s} s while "
            f"{activity.doing.words}; ranks that have not staged it: {list(behind)}",
            layer=row,
            stage=activity.stage,
            doing=activity.doing.words,
            timeout_s=timeout_s,
            waiting_for=behind,
        )

    def _is_drained(self) -> bool:
        """Return whether all that was agreed is done here, or never will be because a copy failed."""
        return self.progress.finished >= self._shared.outlook.agreed or self.progress.copy_failed

    def _conclude(self) -> None:
        """Give back staging that no recovery needs, and complete the error."""
        # Agreement rule 6: a rank in doubt keeps its staging, for a peer may have committed what is in it.
        progress, outlook, faults = self.progress, self._shared.outlook, self._shared.faults
        self.kept = progress.uncopied if self.needs_recovery else ()
        progress.agreed = outlook.agreed
        kept = [layer.buffer for layer in self.kept]
        for buffer in self.pool.buffers:
            if buffer.state is not BufferState.FREE and buffer not in kept:
                self.pool.release(buffer)
        committed = list(progress.committed_rows)
        if self.error is None and outlook.limit < len(progress.rows):
            self.failure.error = UpdateCancelled(
                f"ranks {list(faults.cancelled)} cancelled the update after {len(committed)} of {len(progress.rows)} "
                "layers",
                ranks=faults.cancelled,
            )
        if self.error is not None:
            self.error.add_note(f"layers committed before: {committed}; all others are as they were")
            describe(self.error, progress, in_doubt=self._shared.in_doubt or self.progress.copy_failed)
        self._shared.end(failed=self.error is not None)


def describe(error: Exception, progress: Progress, *, in_doubt: bool) -> None:
    """Add to an error which layers are new, which was under way, and how far it was."""
    facts = {
        "committed_layers": progress.committed_rows,
        "layer_under_way": progress.row_under_way,
        "phase": progress.phase(in_doubt=in_doubt),
    }
    error.__dict__.update(facts)
