"""The stages of an update overlap: layers stream through plan, transfer and commit at once.

::

    plan      N+3 ──(0 slots)──┐
    load      N+2 ──(0 slots)──┤ staging pool: backpressure
    launch    N+1 ──(0 slots)──┤ so that the device begins it when N has arrived
    transfer               N ──┤
    relay                  N ──┤ what crossed nodes once is passed on, while N+1 is being transferred
    agree                  N ──┤ control rounds, likewise
    commit               N-1 ──┘ at an agreed step boundary; in the exclusive mode at once

All layers are planned before the update begins; the *plan* stage cuts one layer out of that plan and makes its maps.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from typing import TypeVar

from anyio import BrokenResourceError, create_memory_object_stream, current_time
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.events.stages import AGREE, COMMIT, PLAN, RELAY, TRANSFER
from async_eplb.staging import StagingPool
from async_eplb.update.admission import Update
from async_eplb.update.boundary import Boundary
from async_eplb.update.layer import LayerInFlight, PlannedLayer
from async_eplb.update.outcome import Failure
from async_eplb.update.progress import Progress
from async_eplb.update.stages import LayerStages
from async_eplb.update.watchdog import Doing, Watchdog

T = TypeVar("T")
U = TypeVar("U")


class LayerPipeline:
    """The tasks of one update's stages, and the streams between them."""

    def __init__(
        self,
        update: Update,
        stages: LayerStages,
        boundary: Boundary,
        progress: Progress,
        failure: Failure,
        shared: SharedAgreement,
        pool: StagingPool,
        watchdog: Watchdog,
    ) -> None:
        self._update = update
        self._stages = stages
        self._boundary = boundary
        self._progress = progress
        self._failure = failure
        self._shared = shared
        self._pool = pool
        self._watchdog = watchdog
        self._paced_until = 0

    def start(self, tasks: TaskGroup, streams: ExitStack) -> None:
        """Start all stages in a task group; what goes wrong in one becomes the update's failure.

        :param streams: closes the streams, after the tasks have ended
        """
        planned_in, planned_out = create_memory_object_stream[PlannedLayer](0)
        loaded_in, loaded_out = create_memory_object_stream[LayerInFlight](0)
        launched_in, launched_out = create_memory_object_stream[LayerInFlight](0)
        arrived_in, arrived_out = create_memory_object_stream[LayerInFlight](0)
        sinks: tuple[AbstractContextManager[object], ...] = (planned_in, loaded_in, launched_in, arrived_in)
        sources: tuple[AbstractContextManager[object], ...] = (planned_out, loaded_out, launched_out, arrived_out)
        for end in (*sinks, *sources):
            streams.enter_context(end)
        for stage in (
            lambda: self._plan_all(planned_in),
            lambda: self._load_all(planned_out, loaded_in),
            lambda: _each(loaded_out, launched_in, self._launch),
            lambda: _each(launched_out, arrived_in, self._transfer),
            lambda: self._stage_all(arrived_out),
            self._commit_all,
        ):
            tasks.start_soon(self.guarded, stage)

    async def guarded(self, stage: Callable[[], Awaitable[None]]) -> None:
        """Run a stage to its end; what goes wrong becomes the update's failure."""
        try:
            await stage()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must get to know
            self._failure.fail(error)

    async def _plan_all(self, planned: MemoryObjectSendStream[PlannedLayer]) -> None:
        with planned:
            for index in range(len(self._update.rows)):
                if index >= self._shared.outlook.limit or self._failure.error is not None:
                    return
                with self._watchdog.doing(PLAN.name, index, Doing.PLAN):
                    layer = await self._stages.plan(index)
                self._progress.planned += 1
                if not await _sent(planned, layer):
                    return

    async def _load_all(
        self, planned: MemoryObjectReceiveStream[PlannedLayer], loaded: MemoryObjectSendStream[LayerInFlight]
    ) -> None:
        await self._shared.until(lambda: self._shared.outlook.begun)
        await _each(planned, loaded, self._load)

    async def _load(self, planned: PlannedLayer, index: int) -> LayerInFlight | None:
        """Prepare a layer's transfer while the one before is under way, and offer it to the other ranks."""
        shared = self._shared
        buffer = await self._pool.acquire()  # rule 9: without a buffer, nothing is under way
        await self._keep_pace(planned)
        if index >= shared.outlook.limit or shared.outlook.over:
            return None
        with self._watchdog.doing(TRANSFER.name, index, Doing.COPY_OWN_SLOTS):
            layer = await self._stages.load(planned, buffer)
        self._progress.layers.append(layer)
        if self._stages.launches_at_steps:
            shared.offer(self._boundary.offer(layer))
        elif self._stages.launch_rule.needs_grant:
            shared.offer(1)
        return layer

    async def _launch(self, layer: LayerInFlight, index: int) -> LayerInFlight | None:
        """Start a layer's transfer while the one before is under way: the device need not wait for this."""
        with self._watchdog.doing(TRANSFER.name, index, Doing.AWAIT_LAUNCH):
            layer.turn_s = current_time()
            if not await self._launch_when_due(layer, index):
                return None
        self._progress.launched += 1
        with self._watchdog.doing(TRANSFER.name, index, Doing.START):
            await self._stages.start(layer)
        return layer

    async def _launch_when_due(self, layer: LayerInFlight, index: int) -> bool:
        """Launch a layer, or wait until a boundary has; return False if it will not be moved."""
        shared = self._shared
        if self._stages.launches_at_steps:
            await shared.until(lambda: layer.hops[0].is_launched or index >= shared.outlook.limit)
            return layer.hops[0].is_launched
        if self._stages.launch_rule.needs_grant:
            await shared.until(lambda: shared.outlook.launched > index or index >= shared.outlook.limit)
            if shared.outlook.launched <= index:
                return False
        elif index >= shared.outlook.limit or shared.outlook.over:
            return False
        await self._stages.launch_from_background(layer)
        return True

    async def _transfer(self, layer: LayerInFlight, index: int) -> LayerInFlight | None:
        with self._watchdog.doing(TRANSFER.name, index, Doing.RECEIVE):
            await self._stages.receive(layer, 0)
        return layer

    async def _stage_all(self, arrived: MemoryObjectReceiveStream[LayerInFlight]) -> None:
        """Follow each layer's second hop, if it has one, until the layer is staged; its launch is agreed already."""
        with arrived:
            async for layer in arrived:
                index = self._progress.staged
                for number, hop in enumerate(layer.hops[1:], 1):
                    with self._watchdog.doing(RELAY, index, Doing.AWAIT_LAUNCH):
                        if self._stages.launches_at_steps:
                            await self._shared.until(lambda hop=hop: hop.is_launched)  # type: ignore[misc]
                    with self._watchdog.doing(RELAY, index, Doing.RECEIVE):
                        await self._stages.receive(layer, number)
                with self._watchdog.doing(RELAY, index, Doing.CHECK):
                    await self._stages.stage(layer)
                self._progress.staged += 1
                self._shared.count(staged=1)
                self._shared.news.notify()

    async def _commit_all(self) -> None:
        """Follow each layer from when it is staged until the device has committed it, also after a failure."""
        for index in count():
            if not await self._commit(index):
                return

    async def _commit(self, index: int) -> bool:
        """Return True when a layer's commit is done on the device, False when it never will be made."""
        shared, progress = self._shared, self._progress
        await shared.until(lambda: progress.staged > index)
        with self._watchdog.doing(AGREE, index, Doing.AWAIT_RANKS):
            await shared.until(lambda: shared.outlook.agreed > index)
        layer = progress.layers[index]
        began_s = await self._until_copied(layer, index)
        if progress.copied <= index:
            return False
        with self._watchdog.doing(COMMIT.name, index, Doing.AWAIT_DEVICE):
            try:
                progress.landed.append(await self._stages.finish(layer, began_s))
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must get to know
                self._failure.fail(error)
        self._pool.release(layer.buffer)
        progress.finished += 1
        shared.count(finished=1)
        shared.news.notify()  # no round follows that would, if a rank is lost
        return True

    async def _until_copied(self, layer: LayerInFlight, index: int) -> float:
        """Return when an agreed layer is copied, or will never be; with the time at which its commit began."""
        shared, progress = self._shared, self._progress
        if self._update.mode is Mode.EXCLUSIVE:
            began_s = current_time()
            with self._watchdog.doing(COMMIT.name, index, Doing.COPY):
                decision = Decision(boundary=0, copied=index + 1, parts_launched=0)
                await self._boundary.execute_beside(decision, step=0, after=self._stages.callers_work)
            return began_s
        with self._watchdog.doing(AGREE, index, Doing.AWAIT_STEP):
            await shared.until(lambda: shared.taken > index or progress.copy_failed)
        with self._watchdog.doing(COMMIT.name, index, Doing.COPY):
            await shared.until(lambda: progress.copied > index or progress.copy_failed)
        return current_time() - layer.copy_ms / 1e3

    async def _keep_pace(self, layer: PlannedLayer) -> None:
        """Wait for as many steps as the layers before may take; all ranks count the same bytes."""
        shared, limit = self._shared, self._update.max_nbytes_per_step
        if limit is None:
            return
        await shared.until_step(self._paced_until, unless=lambda: shared.outlook.standing or shared.outlook.over)
        self._paced_until = shared.outlook.step + -(-layer.peak_nbytes // limit)


async def _each(
    source: MemoryObjectReceiveStream[T],
    sink: MemoryObjectSendStream[U],
    work: Callable[[T, int], Awaitable[U | None]],
) -> None:
    """Do a stage's work on each layer and pass it on; end when it returns None, or nobody takes more."""
    with source, sink:
        index = 0
        async for layer in source:
            done = await work(layer, index)
            if done is None or not await _sent(sink, done):
                return
            index += 1


async def _sent(sink: MemoryObjectSendStream[U], layer: U) -> bool:
    try:
        await sink.send(layer)
    except BrokenResourceError:  # the next stage has ended
        return False
    return True
