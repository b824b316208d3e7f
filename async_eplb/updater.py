"""The façade: move live expert weights to a new placement, alone or while the model serves."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

from anyio import (
    CancelScope,
    create_memory_object_stream,
    current_effective_deadline,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio import Event as LoopEvent
from anyio.lowlevel import checkpoint

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import Driver, until_step
from async_eplb.agreement.steps import Stepper
from async_eplb.commit.committer import committer_for
from async_eplb.device import Device, DeviceEvent, device_for
from async_eplb.errors import BusyTransport, BusyUpdater, ClosedUpdater, EplbError, InvalidOptions, UpdateAborted
from async_eplb.events.emit import Logger, default_logger, emit
from async_eplb.events.schema import LayerCommitted
from async_eplb.expert_map import ExpertMap
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.recover import Attempt, RankState, Recovery, recover
from async_eplb.recovery.survivors import require_on
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.staging import StagingPool
from async_eplb.topology import EPTopology
from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.transport.renumbered import RenumberedControlGroup, RenumberedTransport
from async_eplb.update.admission import (
    changed_rows,
    require_groups,
    require_ranks,
    require_relays,
    require_slots,
    update_digest,
)
from async_eplb.update.handle import UpdateHandle
from async_eplb.update.run import UpdateRun
from async_eplb.update.session import LayerPipeline
from async_eplb.update.stages import LayerStages
from async_eplb.update.summary import UpdaterStatistics, UpdateSummary
from async_eplb.verify.audit import AuditReport, audit_replicas
from async_eplb.verify.column import Verifier, Verify
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Doorbell, News, OtherWorkers, ThreadWorkers, Workers


class ExpertUpdater:
    """Moves the expert weights of one model to new placements, with the other ranks of its EP group.

    An async context manager: entering connects, which all ranks do together; leaving waits for a running update
    to end, cancelled. Enter and leave it in the same task.

    :param weights: live weights of this rank
    :param placement: the placement that they have now
    :param topology: shape of the EP group
    :param rank: this process in the EP group
    :param transport: an unused transport of that group; the updater opens and closes it
    :param on_commit: called with a layer right after its commit is enqueued, in the same thread and stream; for
        state derived from weights, such as fused scales. It must not wait for the device
    :param logger: structlog logger for events; the application's without it
    :param workers: where blocking work runs; threads without it
    :param device: streams and events; the device of the weights without it
    :raises EplbError: if these do not fit together; see :mod:`async_eplb.errors` for each way
    """

    def __init__(
        self,
        weights: ExpertWeights,
        placement: ExpertPlacement,
        topology: EPTopology,
        *,
        rank: int,
        transport: Transport,
        options: UpdateOptions | None = None,
        on_commit: Callable[[int], None] | None = None,
        logger: Logger | None = None,
        workers: Workers | None = None,
        device: Device | None = None,
    ) -> None:
        self.options = options or UpdateOptions()
        require_ranks(topology, rank, transport)
        placement.require_fit(topology)
        require_slots(weights, placement, topology)
        self.topology = topology
        self.rank = rank
        self._placement = placement
        self._device = device or device_for(weights.device)
        self._workers = workers or ThreadWorkers()
        self.run_id = transport.run_id
        self._logger = (logger or default_logger()).bind(run_id=self.run_id)
        self._on_layer = on_commit or (lambda _layer: None)
        self._verifier = Verifier(Verify(self.options.verify), weights, rank)
        written = self._device.record()
        with self._device.committing():
            self._device.wait(written)
            self._verifier.warm_up()
        require_groups(self._verifier.weights, self.options)
        self._transport = transport
        self._live = weights
        self.expert_map = ExpertMap(
            placement,
            topology,
            rank=rank,
            device=weights.device,
            max_replicas=self.options.max_replicas,
            seed=self.options.dispatch_seed,
        )
        self._committer = committer_for(self._verifier.weights, self.expert_map)
        self._pool = StagingPool(self.options.staging_depth, self._device)
        self._news = News()
        self._driver = Driver(
            Agreement(lead=self.options.lead, max_step_skew=self.options.max_step_skew), ring=self._ring
        )
        self._stepper = Stepper(self._driver, self._news, self._logger, rank, self._execute_at_step)
        self._doorbell: Doorbell | None = None
        self._pipeline: LayerPipeline | None = None
        self._rounds_ended = LoopEvent()
        self._stack = AsyncExitStack()
        self._run: UpdateRun | None = None
        self._closed_because = "it was not entered yet"
        self._broken_because = ""
        self._failed_run: UpdateRun | None = None
        self._dead: tuple[int, ...] = ()
        self._attempt = Attempt()
        self._num_finished = 0
        self._num_failed = 0
        self._num_layers_committed = 0

    def __repr__(self) -> str:
        state = f"closed: {self._closed}" if self._closed else "updating" if self._run else "idle"
        return f"<ExpertUpdater rank {self.rank} of {self.topology.num_ranks}, {state}>"

    @property
    def placement(self) -> ExpertPlacement:
        """The placement that the live weights have, as far as committed."""
        if self._run is None:
            return self._placement
        return self._placement.with_layers(self._run.target, tuple(self._run.committed))

    def statistics(self) -> UpdaterStatistics:
        """Return what this updater has done so far."""
        return UpdaterStatistics(
            generation=self._driver.generation,
            updating=self._run is not None,
            num_updates_finished=self._num_finished,
            num_updates_failed=self._num_failed,
            num_layers_committed=self._num_layers_committed,
            step=self._driver.step,
            lead=self._driver.lead,
            num_rounds=self._driver.num_rounds,
            num_fence_waits=self._stepper.num_waits,
            fence_wait_ms=self._stepper.wait_ms,
            longest_step_ms=self._stepper.longest_ms,
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._doorbell = self._workers.doorbell()
            stack.callback(self._doorbell.close)
            self._pipeline = LayerPipeline(self._driver, self._news, self._doorbell, self._workers)
            await stack.enter_async_context(self._pipeline)
            stack.push_async_callback(self._close_transport)
            control = await self._transport.open(
                self._device,
                self._workers,
                self._verifier.weights,
                control_timeout_s=self.options.control_timeout_s,
                relay_peers=self._relay_peers,
            )
            self._connect(control)
            await checkpoint()  # the rounds have begun, even if the caller's loop is blocked from here on
            self._closed_because = ""
            stack.push_async_callback(self._leave)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._closed_because = self._closed_because or "it was left"
        return await self._stack.__aexit__(kind, error, traceback)

    async def update(
        self,
        new_placement: ExpertPlacement,
        *,
        layers: Iterable[int] | None = None,
        after: DeviceEvent | None = None,
    ) -> UpdateSummary:
        """Move the weights to a new placement; return when all layers are committed on every rank.

        All ranks call this with equal arguments, none of them serving meanwhile. If the awaiting task is
        cancelled, layers that may be under way are still committed, on all ranks the same ones, before the
        cancellation goes on.

        :param layers: rows to update; all without it
        :param after: as for :meth:`begin`
        :raises EplbError: see :mod:`async_eplb.errors`; what was refused has changed nothing, and what ended
            early says which layers were committed
        """
        run = self._begin(Mode.EXCLUSIVE, new_placement, layers, after=after)
        await self._join(run)
        return run.summary()

    async def stream(
        self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None
    ) -> AsyncGenerator[LayerCommitted, None]:
        """Do what :meth:`update` does, and yield each layer as it lands on this rank.

        Leaving the loop early cancels the update (close the iterator, as with ``contextlib.aclosing``).
        """
        sender, receiver = create_memory_object_stream[LayerCommitted](math.inf)
        run = self._begin(Mode.EXCLUSIVE, new_placement, layers, sender.send_nowait, sender.close)
        with receiver:
            try:
                async for committed in receiver:
                    yield committed
            finally:
                if not run.finished.is_set():
                    run.cancel()
                await self._join(run)
        run.summary()

    def begin(
        self,
        new_placement: ExpertPlacement,
        *,
        layers: Iterable[int] | None = None,
        max_nbytes_per_step: int | None = None,
        after: DeviceEvent | None = None,
    ) -> UpdateHandle:
        """Begin to move the weights while the model serves; return at once.

        All ranks call this with equal arguments, each when it comes to it. Layers are committed inside
        :meth:`step`, on every rank at the same boundary.

        :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each step at most, on average;
            not heeded while this rank makes no steps
        :param after: work on the device that wrote live weights last; without it, what this thread's current stream
            has now
        :raises EplbError: as :meth:`update`, for what is refused
        """
        return UpdateHandle(
            self._begin(Mode.SERVING, new_placement, layers, max_nbytes_per_step=max_nbytes_per_step, after=after)
        )

    async def step(self, number: int | None = None) -> None:
        """Pass a step boundary: call this once before every forward pass on every rank, dummy passes included.

        Layers that are due here are committed now, on the current stream of this thread, which must be the one
        that the model's work is launched from. Waits for nothing in a normal run; while an update runs, it gives
        other tasks of the event loop one turn. If it is cancelled, the boundary has not been passed.

        :param number: the engine's global number of the pass, if it has one: 1 more each time, equal on all ranks
        :raises StepMismatch: if ``number`` is not the next one; the boundary has not been passed
        :raises RankInDoubt: if this boundary's fence was lost with a rank
        :raises BusyUpdater: inside :meth:`idle` or :meth:`paused`, or while another task is in ``step()``
        :raises Exception: what ``on_commit`` raised
        """
        if self._run is not None:
            await checkpoint()
        await self._stepper.step(number)

    def step_sync(self, number: int | None = None) -> None:
        """Do what :meth:`step` does on any thread, with a plain wait."""
        self._stepper.step_sync(number)

    def record(self) -> DeviceEvent:
        """Return the work that this thread's current stream has now; for callers of another thread's ``after``."""
        return self._device.record()

    async def until_step(self, number: int) -> None:
        """Return when this rank has passed boundary ``number``, counted as :meth:`step` does, or makes no steps."""
        await until_step(self._driver, self._news, number, unless=lambda: self._driver.standing)

    def demand_rebalance(self, number: int) -> None:
        """Ask all ranks to make their rebalance ``number``, counted from 1; a control round tells them."""
        self._driver.demand(number)

    async def until_rebalance(self, number: int, *, due_step: int | None) -> None:
        """Return when some rank has demanded rebalance ``number``; demand it when boundary ``due_step`` is passed.

        :raises ClosedUpdater: if no rebalance follows
        """
        driver = self._driver

        def demanded() -> bool:
            return driver.demanded >= number or bool(self._closed)

        if due_step is None:
            await self._news.until(demanded)
        else:
            await until_step(driver, self._news, due_step, unless=demanded)
            self.demand_rebalance(number)
        if self._closed:
            raise ClosedUpdater(f"{self!r}: no rebalance follows")

    @asynccontextmanager
    async def idle(self, *, after: DeviceEvent | None = None) -> AsyncIterator[None]:
        """Inside, this rank has no traffic and makes no steps: layers that are due at its next boundary are committed.

        So an update ends although nobody steps, once all ranks stand before the same boundary.

        :param after: the model's last work on the device; without it, what this thread's current stream has now
        :raises BusyUpdater: if this rank stands already
        """
        async with self._standing("idle", after):
            yield

    @asynccontextmanager
    async def paused(self, *, after: DeviceEvent | None = None) -> AsyncIterator[None]:
        """Inside, nothing reads or writes live weights: for a refit, sleep mode, or the capture of a CUDA graph.

        All ranks enter together and make no steps. A running update is finished first.

        :param after: as for :meth:`idle`
        :raises BusyUpdater: if this rank stands already
        """
        async with self._standing("paused", after):
            if self._run is not None:
                await self._run.finished.wait()
            yield

    async def recover(self, surviving_group: Transport, *, source: WeightSource | None = None) -> Recovery:
        """Go on with the ranks that are left after a failure; all call this together, and none serves meanwhile.

        Layers are compared and the ones in doubt committed from kept staging, so that weights and maps agree on every
        survivor. Slots of ranks that are gone become empty: physical experts keep their numbers, published maps their
        shape and addresses, and :attr:`rank` stays. Passes go on after the boundary that the rank which was ahead has
        passed (:attr:`Recovery.step`). Not cancelled: it ends within a few times ``control_timeout_s``.

        :param surviving_group: an unused transport between the survivors, in the order of their ranks; of all ranks
            if none is gone
        :param source: where experts are loaded from that no survivor holds
        :raises ClosedUpdater: if this updater was left, or never entered
        :raises BusyUpdater: inside a step, :meth:`idle` or :meth:`paused`
        :raises Unrecoverable: if a survivor cannot follow the others
        :raises BrokenControlGroup: if another rank is lost meanwhile; call this again without it
        """
        if self._pipeline is None or self._closed_because:
            raise ClosedUpdater(f"{self!r} cannot recover")
        with self._stepper.standing("recovering"), CancelScope(shield=True):
            async with self._staying_behind(surviving_group):
                await self._end_everything(self._pipeline)
                control = await surviving_group.open(
                    self._device,
                    self._workers,
                    self._verifier.weights,
                    control_timeout_s=self.options.control_timeout_s,
                    relay_peers=self._relay_peers if surviving_group.num_ranks == self.topology.num_ranks else (),
                )
                recovery = await self._agree_again(control, source)
            self._failed_run = None
            self._broken_because = ""
            self._dead = tuple(rank for rank in range(self.topology.num_ranks) if rank not in recovery.ranks)
            self._transport = RenumberedTransport(surviving_group, recovery.ranks, self.topology.num_ranks)
            self._driver.restart(recovery.ranks, generation=recovery.generation, step=recovery.step)
            self._connect(RenumberedControlGroup(control, recovery.ranks))
            await checkpoint()
        return recovery

    async def audit(self, group: Transport) -> AuditReport:
        """Compare the bytes of all replicas of all experts across ranks; all ranks call this together.

        Reads every slot once, on the device, and sends 8 bytes for each. Layers must stay as they are meanwhile.

        :param group: an unused transport between the ranks, used for one control round and closed
        :raises BusyUpdater: if an update is running
        :raises ClosedUpdater: if this updater is not open
        """
        if self._closed_because:
            raise ClosedUpdater(f"{self!r} cannot audit")
        if self._run is not None:
            raise BusyUpdater(f"{self!r}: an audit reads what an update changes; wait for its end")
        return await audit_replicas(
            self._live,
            self._placement,
            self.topology,
            members=[rank for rank in range(self.topology.num_ranks) if rank not in self._dead],
            rank=self.rank,
            group=group,
            device=self._device,
            workers=OtherWorkers(self._workers, "audit"),  # this updater's own rounds go on
            control_timeout_s=self.options.control_timeout_s,
        )

    @asynccontextmanager
    async def _staying_behind(self, surviving_group: Transport) -> AsyncIterator[None]:
        """Let no step pass from a failure inside on: peers may have committed what this rank has not."""
        try:
            yield
        except BaseException as error:
            self._driver.hold(
                error if isinstance(error, EplbError) else ClosedUpdater(f"{self!r} did not recover: {error!r}")
            )
            if not isinstance(error, BusyTransport):  # which somebody else has open
                await surviving_group.aclose()
            raise

    async def _agree_again(self, control: ControlGroup, source: WeightSource | None) -> Recovery:
        """Bring this rank to what all survivors have."""
        state = RankState(
            rank=self.rank,
            topology=self.topology,
            placement=self._placement,
            step=self._driver.step,
            generation=self._driver.generation,
            run=self._failed_run,
            weights=self._live,
            expert_map=self.expert_map,
            device=self._device,
            workers=self._workers,
            attempt=self._attempt,
        )
        try:
            return await recover(state, control, source)
        finally:
            self._placement, self._attempt = state.placement, state.attempt

    async def _end_everything(self, pipeline: LayerPipeline) -> None:
        """End the running update after what was agreed, the control rounds, and the transport."""
        run = self._run
        if run is not None:
            pipeline.stand(self._device.record(), for_good=True)
            run.fail(UpdateAborted(f"rank {self.rank} gave the update up to recover", ranks=(self.rank,)))
            await run.finished.wait()
            await pipeline.stand_no_more()
        self._broken_because = self._broken_because or "it did not recover"
        self._driver.leave()
        await self._rounds_ended.wait()
        await self._transport.aclose()

    @property
    def _relay_peers(self) -> tuple[int, ...]:
        """The ranks that this one passes experts on to, or has them from."""
        return self.topology.neighbours_of(self.rank) if self.options.planner.relays else ()

    @property
    def _closed(self) -> str:
        """Why no update can begin; empty if one can."""
        driver = self._driver
        gone = f"a rank was lost: {driver.lost}" if driver.lost else f"ranks {list(driver.left)} have left"
        return self._closed_because or self._broken_because or (gone if driver.lost or driver.left else "")

    def _begin(
        self,
        mode: Mode,
        new_placement: ExpertPlacement,
        layers: Iterable[int] | None,
        on_commit: Callable[[LayerCommitted], None] = lambda _: None,
        on_finish: Callable[[], None] = lambda: None,
        *,
        max_nbytes_per_step: int | None = None,
        after: DeviceEvent | None = None,
    ) -> UpdateRun:
        if max_nbytes_per_step is not None and max_nbytes_per_step < 1:
            raise InvalidOptions(
                f"max_nbytes_per_step is {max_nbytes_per_step}; it must be at least 1", option="max_nbytes_per_step"
            )
        if self._closed or self._pipeline is None:
            raise ClosedUpdater(f"{self!r} cannot update")
        if self._run is not None:
            raise BusyUpdater(f"{self!r}: wait for the running update before the next one")
        if self._stepper.standing_for == "paused":
            raise BusyUpdater(f"{self!r} is paused: an update can begin when it is not")
        weights = self._verifier.weights
        require_on(new_placement, self.topology, self._dead)
        require_relays(self.options, self._transport)
        rows = changed_rows(
            self._placement,
            new_placement,
            layers,
            weights=weights,
            topology=self.topology,
            expert_map=self.expert_map,
        )
        stages = LayerStages(
            generation=self._driver.generation + 1,
            rank=self.rank,
            old=self._placement,
            new=new_placement,
            mode=mode,
            topology=self.topology,
            verifier=self._verifier,
            expert_map=self.expert_map,
            committer=self._committer,
            transport=self._transport,
            device=self._device,
            workers=self._workers,
            logger=self._logger,
            options=self.options,
            after=after or self._device.record(),
            step=lambda: self._driver.step,
        )

        def count(committed: LayerCommitted) -> None:
            self._num_layers_committed += 1
            on_commit(committed)

        def finish(run: UpdateRun) -> None:
            self._finish(run)
            on_finish()

        run = UpdateRun(
            stages=stages,
            target=new_placement,
            rows=rows,
            digest=update_digest(
                self._placement,
                new_placement,
                rows,
                mode=mode,
                weights=weights,
                topology=self.topology,
                options=self.options,
            ),
            driver=self._driver,
            news=self._news,
            pool=self._pool,
            workers=self._workers,
            begin_timeout_s=2 * self.options.control_timeout_s,  # a lost round comes first, and says who is missing
            max_nbytes_per_step=max_nbytes_per_step,
            progress_timeout_s=self.options.progress_timeout_s,
            on_layer=self._on_layer,
            on_commit=count,
            on_finish=finish,
        )
        self._run = run
        self._pipeline.start_update(run)
        return run

    def _finish(self, run: UpdateRun) -> None:
        """Take over what an update has committed, and say how it ended."""
        self._placement = self.placement
        self._run = None
        if run.broke:
            self._broken_because = f"an update failed with {type(run.error).__name__}; recover() reopens it"
            self._failed_run = run
        if run.error is None:
            self._num_finished += 1
        else:
            self._num_failed += 1
        emit(self._logger, run.ending())

    @staticmethod
    async def _join(run: UpdateRun) -> None:
        """Wait for the end of an update; if this is cancelled, for the end of the cancelled update."""
        try:
            await run.finished.wait()
        except get_cancelled_exc_class():
            run.cancel()
            with CancelScope(shield=True):
                await run.finished.wait()
            raise

    @asynccontextmanager
    async def _standing(self, reason: str, after: DeviceEvent | None) -> AsyncIterator[None]:
        if self._pipeline is None or self._closed:
            raise ClosedUpdater(f"{self!r} cannot be {reason}")
        with self._stepper.standing(reason):
            try:
                self._pipeline.stand(after or self._device.record())
                yield
            finally:
                await self._pipeline.stand_no_more()

    def _execute_at_step(self, decision: Decision) -> Exception | None:
        if self._run is None:
            return None
        error = self._run.execute(decision, step=self._driver.step)
        self._ring()
        return error

    def _ring(self) -> None:
        if self._doorbell is not None:
            self._doorbell.ring()

    def _connect(self, control: ControlGroup) -> None:
        """Begin to hold control rounds."""
        if self._pipeline is None:
            raise ClosedUpdater(f"{self!r} cannot connect")
        self._rounds_ended = LoopEvent()
        self._driver.connect(control.wake, self._transport.launch_rule)
        self._pipeline.start(partial(self._hold_rounds, control))

    async def _hold_rounds(self, control: ControlGroup) -> None:
        try:
            await control.run(self._driver)
        finally:
            self._rounds_ended.set()

    async def _leave(self) -> None:
        """End a running update, which no step follows any more, and the control rounds."""
        cancelled: list[BaseException] = []
        with CancelScope(shield=True):
            run = self._run
            if run is not None and self._pipeline is not None:
                run.cancel()
                self._pipeline.stand(self._device.record(), for_good=True)
                cancelled += await _outlast(run.finished, self.options.control_timeout_s)
                if not run.finished.is_set():
                    self._driver.fail(alone=True)
                cancelled += await _outlast(run.finished)
            self._driver.leave()
            cancelled += await _outlast(self._rounds_ended)
        if cancelled:
            raise cancelled[0]

    async def _close_transport(self) -> None:
        with CancelScope(shield=True):
            await self._transport.aclose()


async def _outlast(event: LoopEvent, timeout_s: float = math.inf) -> list[BaseException]:
    """Wait for an event however often asyncio cancels the task, which no shield keeps off; return the cancellations."""
    cancelled: list[BaseException] = []
    with move_on_after(timeout_s):
        while not event.is_set():
            try:
                await event.wait()
            except get_cancelled_exc_class() as error:
                if current_effective_deadline() == -math.inf:
                    raise
                cancelled.append(error)
    return cancelled


__all__ = ["ExpertUpdater", "LayerCommitted", "UpdateHandle", "UpdateOptions", "UpdateSummary", "UpdaterStatistics"]
