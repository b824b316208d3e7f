"""The overlap: layers stream through plan, transfer and commit at once. The only task groups of the package.

::

    plan      N+1 ──(0 slots)──┐
    transfer               N ──┤ staging pool: backpressure
    agree                  N ──┤ a control round, while N+1 is being transferred
    commit               N-1 ──┘

An update runs in a task of its own, shielded: its caller may be cancelled at any time, but a posted exchange has
another side. A cancellation becomes a ballot, and the update ends at the same layer on every rank.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from anyio import BrokenResourceError, CancelScope, Event, create_memory_object_stream, create_task_group
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from async_eplb.agreement import Agreement, Ballot, Verdict
from async_eplb.errors import BrokenControlGroup, UpdateAborted, UpdateCancelled
from async_eplb.events import LayerCommitted
from async_eplb.stages import LayerStages, PlannedLayer, StagedLayer, Stopwatch
from async_eplb.staging import BufferState, StagingPool
from async_eplb.transport.base import ControlGroup


class LayerPipeline:
    """The task group that updates run in. It is left when its last update has ended."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(create_task_group())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the task group without telling it of the caller's error, which it would wrap in a group."""
        self._tasks = None
        await self._stack.aclose()

    def start(self, run: "UpdateRun") -> None:
        """Run an update in the background; what becomes of it is told by the run."""
        if self._tasks is None:
            raise RuntimeError("the pipeline is not open")
        self._tasks.start_soon(run.run)


class UpdateRun:
    """One update on its way through the stages.

    :param rows: layers that change, in update order
    :param on_commit: called with each layer as it lands
    :param on_finish: called at the end, whatever it is
    """

    def __init__(
        self,
        *,
        stages: LayerStages,
        rows: tuple[int, ...],
        agreement: Agreement,
        control: ControlGroup,
        pool: StagingPool,
        on_commit: Callable[[LayerCommitted], None],
        on_finish: Callable[["UpdateRun"], None],
    ) -> None:
        self.stages = stages
        self.rows = rows
        self.agreement = agreement
        self.committed: list[int] = []
        self.error: Exception | None = None
        self.finished = Event()
        self.duration_ms = 0.0
        self._control = control
        self._pool = pool
        self._on_commit = on_commit
        self._on_finish = on_finish
        self._staged: deque[StagedLayer] = deque()
        self._begun = Event()
        self._drained = Event()
        self._news = Event()
        self._cancelled_by: tuple[int, ...] = ()

    @property
    def broke(self) -> bool:
        """Whether the update failed in a way after which this rank and its peers cannot go on together."""
        if self.error is None or isinstance(self.error, UpdateCancelled):
            return False
        return self._begun.is_set() or isinstance(self.error, BrokenControlGroup)

    def cancel(self) -> None:
        """Ask all ranks to end the update after the layers that may already be under way."""
        self.agreement.cancel()
        self._news.set()

    async def run(self) -> None:
        """Run the update to its end; the outcome is in :attr:`error` and :attr:`committed`."""
        watch = Stopwatch()
        planned_in, planned_out = create_memory_object_stream[PlannedLayer](0)
        agreed_in, agreed_out = create_memory_object_stream[StagedLayer](len(self.rows))
        with CancelScope(shield=True), planned_in, planned_out, agreed_in, agreed_out:
            async with create_task_group() as tasks:
                tasks.start_soon(self._guard, lambda: self._plan(planned_in))
                tasks.start_soon(self._guard, lambda: self._transfer(planned_out))
                tasks.start_soon(self._guard, lambda: self._commit(agreed_out))
                await self._agree(agreed_in)
                agreed_in.close()
                await self._drained.wait()
                tasks.cancel_scope.cancel()
            for buffer in self._pool.buffers:
                if buffer.state is not BufferState.FREE:
                    self._pool.release(buffer)
        self.duration_ms = watch.ms()
        self._conclude()
        try:
            self._on_finish(self)
        except Exception as error:  # noqa: BLE001 - raised to the caller, whose logger it probably was
            self.error = self.error or error
        finally:
            self.finished.set()

    async def _guard(self, stage: Callable[[], Awaitable[None]]) -> None:
        try:
            await stage()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        if self._begun.is_set():
            self.stages.abort()
        self.agreement.fail()
        self._news.set()

    async def _plan(self, planned: MemoryObjectSendStream[PlannedLayer]) -> None:
        with planned:
            for index, row in enumerate(self.rows):
                if index >= self.agreement.limit:
                    return
                layer = await self.stages.plan(row)
                try:
                    await planned.send(layer)
                except BrokenResourceError:
                    return

    async def _transfer(self, planned: MemoryObjectReceiveStream[PlannedLayer]) -> None:
        await self._begun.wait()
        with planned:
            async for layer in planned:
                buffer = await self._pool.acquire()
                if self.agreement.staged >= self.agreement.limit:
                    self._pool.release(buffer)
                    return
                self._staged.append(await self.stages.fill(layer, buffer))
                self.agreement.staged += 1
                self._news.set()

    async def _commit(self, agreed: MemoryObjectReceiveStream[StagedLayer]) -> None:
        try:
            async for layer in agreed:
                committed = await self.stages.commit(layer)
                self._pool.release(layer.buffer)
                self.committed.append(layer.planned.row)
                self.agreement.committed += 1
                self._on_commit(committed)
                self._news.set()
        finally:
            self._drained.set()

    async def _agree(self, agreed: MemoryObjectSendStream[StagedLayer]) -> None:
        """Hold control rounds until nothing is left to do, and pass on what may be committed."""
        try:
            await self.stages.prepare(self._pool, self.rows)
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of it
            self._fail(error)
        try:
            while not self.agreement.over:
                while not self.agreement.has_news():
                    self._news = Event()
                    await self._news.wait()
                known = self.agreement.agreed
                rows = await self._control.gather(self.agreement.ballot().to_row())
                verdict = self.agreement.receive([Ballot.from_row(row) for row in rows])
                for _ in range(verdict.agreed - known):
                    agreed.send_nowait(self._staged.popleft())
                self._heed(verdict)
        except Exception as error:  # noqa: BLE001 - raised to the caller at the end of the update
            self._fail(error)

    def _heed(self, verdict: Verdict) -> None:
        if verdict.failed:
            if self.error is None:
                self.error = UpdateAborted(
                    f"ranks {list(verdict.failed)} failed; see their errors", ranks=verdict.failed
                )
            if self._begun.is_set():
                self.stages.abort()
        elif verdict.cancelled and not self._cancelled_by:
            self._cancelled_by = verdict.cancelled
        if not self._begun.is_set() and not verdict.failed:
            self._begun.set()
            self.stages.log_start(self._pool, self.rows)

    def _conclude(self) -> None:
        if self.error is None and self.agreement.limit < len(self.rows):
            self.error = UpdateCancelled(
                f"ranks {list(self._cancelled_by)} cancelled the update after {len(self.committed)} of "
                f"{len(self.rows)} layers",
                ranks=self._cancelled_by,
            )
        if self.error is not None:
            self.error.add_note(f"layers committed before: {self.committed}; all others are as they were")
            self.error.__dict__["committed_layers"] = tuple(self.committed)
