"""An entered updater: its task group, its transport and control rounds, and the running update.

While the rank makes no steps, layers that are agreed on are committed from here, because no step comes to their
boundary.
"""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from anyio import CancelScope, Event, Lock, create_task_group
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.agreement.steps import Stepper
from async_eplb.device import DeviceEvent
from async_eplb.errors import BusyTransport, UpdateAborted
from async_eplb.event_loop import outlast
from async_eplb.events.emit import emit
from async_eplb.events.passes import PassTimer
from async_eplb.placement import ExpertPlacement
from async_eplb.staging import StagingPool
from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.update.admission import Request, admit
from async_eplb.update.connection import Connection
from async_eplb.update.life import Life, LifeState
from async_eplb.update.rank import Rank
from async_eplb.update.reserve import allocate
from async_eplb.update.run import UpdateRun
from async_eplb.update.state import RankState
from async_eplb.update.summary import UpdaterStatistics
from async_eplb.workers import Doorbell, Work


class Session:
    """The tasks of one updater. It is left when its last update has ended.

    :param transport: an unused one; another takes its place in a recovery
    """

    def __init__(self, rank: Rank, placement: ExpertPlacement, shared: SharedAgreement, transport: Transport) -> None:
        self.connection = Connection(transport)
        self.state = RankState(placement)
        self.pool = StagingPool(rank.options.staging_depth, rank.device, rank.buffer_size)
        self.running: UpdateRun | None = None
        self.life = Life()
        self.passes = PassTimer(self._generation_under_way, shared.ring)
        self.rank = rank
        """Replaced whole when weights are rebound; nothing keeps it from one update to the next."""
        self._shared = shared
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None
        self._rounds_ended = Event()
        self._due_work = Lock()
        self._stood: DeviceEvent | None = None
        self._for_good = False
        self._layers: tuple[int, Sequence[object]] = 0, ()
        """Layers committed before the last update, and those that it has committed."""

    async def open(self) -> None:
        """Connect to all ranks, which do this together, allocate staging, and begin to hold control rounds."""
        self.life.home.settle()
        async with AsyncExitStack() as stack:
            doorbell = self.rank.workers.doorbell()
            stack.callback(doorbell.close)
            self._shared.listen_with(doorbell)
            tasks = AsyncExitStack()
            self._tasks = await tasks.enter_async_context(create_task_group())
            listening = CancelScope(shield=True)
            self._tasks.start_soon(self._listen, doorbell, listening)
            stack.push_async_callback(self._end_tasks, tasks, listening)
            stack.callback(self.life.enter, LifeState.LEFT, "it could not be entered")
            try:
                control = await self.connection.open(self.rank)
            except BusyTransport:  # which somebody else has open
                raise
            except BaseException:
                await self._close_transport()
                raise
            stack.push_async_callback(self._close_transport)
            await self.rank.workers.run(Work.CONNECT, partial(allocate, self.pool, self.rank))
            stack.push_async_callback(self._end_running)
            await self.connect(control)
            self._stack = stack.pop_all()

    async def aclose(self) -> None:
        """End the running update, which no step follows any more, the control rounds, and the transport."""
        self.life.enter(LifeState.LEFT, "it was left")
        self.passes.close()
        self._log_passes()
        await self._stack.aclose()

    async def connect(self, control: ControlGroup) -> None:
        """Begin to hold control rounds."""
        self._rounds_ended = Event()
        self._shared.connect(control.wake, self.connection.transport.launch_rule)
        self._start(self._hold_rounds, control)
        self.life.enter(LifeState.OPEN)
        await checkpoint()  # the rounds have begun, even if the caller's loop is blocked from here on

    async def rebind(self, make: Callable[[], Rank]) -> None:
        """Go on with another rank, which differs in where its weights are. All ranks do this together. Not cancelled.

        :param make: returns it; called in another thread
        :raises EplbError: what ``make`` raises, and nothing has changed; or if the transport cannot, and no update can
            begin before ``recover()``
        """
        with CancelScope(shield=True):
            async with self._due_work:
                self.rank = await self.rank.workers.run(Work.COMMIT, make)
                try:
                    await self.connection.rebind(self.rank)
                except BaseException as error:
                    self.life.enter(LifeState.BROKEN, f"weights could not be rebound ({error}); recover() reopens it")
                    raise

    async def disconnect(self) -> None:
        """End the running update after what was agreed, the control rounds, and the transport."""
        run = self.running
        if run is not None:
            self.stand(self.rank.device.record(), for_good=True)
            number = self.rank.number
            run.failure.fail(UpdateAborted(f"rank {number} gave the update up to recover", ranks=(number,)), alone=True)
            try:
                await run.finished.wait()
            finally:
                await self.stand_no_more()
        self.life.enter(LifeState.BROKEN, "it did not recover")
        self._shared.leave()
        await self._rounds_ended.wait()
        await self.connection.aclose()

    @property
    def closed(self) -> str:
        """Why no update can begin; empty if one can."""
        return self.life.reason or self._shared.faults.no_more_updates

    @property
    def stood(self) -> DeviceEvent | None:
        """The model's last work, while this rank makes no steps; None if it makes some."""
        return self._stood if self._shared.outlook.standing else None

    @property
    def placement(self) -> ExpertPlacement:
        """The placement that the live weights have, as far as committed."""
        run, placement = self.running, self.state.placement
        return placement if run is None else placement.with_layers(run.update.new, run.progress.committed_rows)

    def statistics(self, stepper: Stepper) -> UpdaterStatistics:
        """Return what the updater has done so far."""
        outlook, totals = self._shared.outlook, self.state.totals
        before, landed = self._layers
        return UpdaterStatistics(
            generation=outlook.generation,
            updating=self.running is not None,
            num_updates_finished=totals.num_finished,
            num_updates_failed=totals.num_failed,
            num_layers_committed=before + len(landed),
            step=outlook.step,
            lead=outlook.lead,
            num_rounds=self._shared.num_rounds,
            num_fence_waits=stepper.num_waits,
            fence_wait_ms=stepper.wait_ms,
            longest_step_ms=stepper.longest_ms,
            num_events_lost=self.rank.logger.num_lost,
            passes_beside_updates=replace(self.passes.beside),
            other_passes=replace(self.passes.alone),
        )

    def start_update(self, request: Request) -> UpdateRun:
        """Begin an update in the background.

        :raises EplbError: if the request is refused; nothing has changed
        """
        update = admit(
            request,
            self.rank,
            self.state.placement,
            transport=self.connection.transport,
            gone=self.state.gone,
            generation=self._shared.outlook.following,
        )
        opens = self.connection.is_broken
        if opens:
            self.connection.replace(update.generation)
        run = UpdateRun(
            self.rank,
            update,
            transport=self.connection.transport,
            shared=self._shared,
            pool=self.pool,
            open_transport=partial(self.connection.open_replacement, self.rank) if opens else None,
        )
        before, landed = self._layers
        self._layers = before + len(landed), run.progress.landed
        if update.mode is Mode.EXCLUSIVE:
            self.passes.skip()
        self.running = run
        self._start(self._run, run)
        return run

    def stand(self, after: DeviceEvent, *, for_good: bool = False) -> None:
        """From now on, do what is due although this rank makes no steps (agreement rule 8).

        :param after: the model's last work
        :param for_good: no step follows at all
        """
        self._stood = after
        self._for_good = for_good
        self._shared.set_standing(standing=True)

    async def stand_no_more(self) -> None:
        """Leave what is due to steps again; nothing is under way when this returns."""
        self._shared.set_standing(standing=False)
        with CancelScope(shield=True):
            async with self._due_work:
                return

    def execute(self, decision: Decision) -> Exception | None:
        """Carry out what is due at the boundary that the serving thread has just passed, on its current stream."""
        run = self._agreed_on()
        if run is None:
            return None
        error = run.boundary.execute(decision, step=self._shared.outlook.step)
        self._shared.ring()
        return error

    def _start(self, function: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> None:
        """Run a function in the background until it ends, whatever becomes of the caller."""
        if self._tasks is None:
            raise RuntimeError("the session is not open")

        async def shielded() -> None:
            with CancelScope(shield=True):
                await function(*arguments)

        self._tasks.start_soon(shielded)

    async def _run(self, run: UpdateRun) -> None:
        """Run an update to its end, and keep what it has done and what it left broken."""
        try:
            await run.run()
        except Exception as error:  # noqa: BLE001 - a defect
            self._give_up(run, error)
        except BaseException:  # the event loop is shut down, which no shield keeps off
            number = self.rank.number
            self._give_up(run, UpdateAborted(f"the event loop of rank {number} was shut down", ranks=(number,)))
            raise
        finally:
            self._conclude(run)

    def _give_up(self, run: UpdateRun, error: Exception) -> None:
        """End an update that did not come to its own end, so that nobody waits for ever, here or on other ranks."""
        run.failure.error = run.failure.error or error
        self._shared.fail(alone=True)
        self._shared.end(failed=True)

    def _conclude(self, run: UpdateRun) -> None:
        self.state.placement = self.placement
        self.running = None
        self.state.totals.add(failed=run.error is not None)
        if run.needs_recovery:
            reason = f"an update failed with {type(run.error).__name__}; recover() reopens it"
            self.life.enter(LifeState.BROKEN, reason)
            self.state.failed_run = run
        else:  # decided by what all ranks know that have begun it
            connection, outlook = self.connection, self._shared.outlook
            connection.is_broken = outlook.void or (connection.is_broken and not outlook.begun)
        try:
            run.log_end()
        finally:
            run.finished.set()
            self._shared.news.notify()

    async def _hold_rounds(self, control: ControlGroup) -> None:
        try:
            await control.run(self._shared)
        except BaseException:  # the event loop is shut down; the thread goes on, to its last round
            self._shared.fail(alone=True)
            self._shared.leave()
            raise
        finally:
            self._rounds_ended.set()

    async def _listen(self, doorbell: Doorbell, listening: CancelScope) -> None:
        with listening:
            while True:
                await doorbell.wait()
                self._shared.news.notify()
                self._log_passes()
                await self._do_due_work()

    async def _do_due_work(self) -> None:
        """Do what is due while this rank stands."""
        async with self._due_work:
            run, decision = self._agreed_on(), self._shared.due_while_standing(for_good=self._for_good)
            if decision is None or run is None or self._stood is None:
                return
            with CancelScope(shield=True):
                step = self._shared.outlook.step + 1
                await run.boundary.execute_beside(decision, step=step, after=self._stood)
            self._shared.news.notify()

    def _agreed_on(self) -> UpdateRun | None:
        """Return the update under way; none until it has begun here, for decisions are still about the one before."""
        run = self.running
        return run if run is not None and run.update.generation == self._shared.outlook.generation else None

    def _generation_under_way(self) -> int:
        run = self.running
        return 0 if run is None else run.update.generation

    def _log_passes(self) -> None:
        outlook = self._shared.outlook
        for period in self.passes.periods():
            event = period.event(generation=outlook.generation, rank=self.rank.number, step=outlook.step)
            emit(self.rank.logger, event)

    async def _end_running(self) -> None:
        """End a running update, which no step follows any more, and the control rounds."""
        cancelled: list[BaseException] = []
        with CancelScope(shield=True):
            run = self.running
            if run is not None:
                run.cancel()
                self.stand(self.rank.device.record(), for_good=True)
                cancelled += await outlast(run.finished, self.rank.options.control_timeout_s)
                if not run.finished.is_set():
                    self._shared.fail(alone=True)
                cancelled += await outlast(run.finished)
            self._shared.leave()
            cancelled += await outlast(self._rounds_ended)
        self._shared.news.notify()
        if cancelled:
            raise cancelled[0]

    async def _close_transport(self) -> None:
        with CancelScope(shield=True):
            await self.connection.aclose()

    async def _end_tasks(self, tasks: AsyncExitStack, listening: CancelScope) -> None:
        """Leave the task group without telling it of the caller's error, which it would wrap in a group."""
        self._tasks = None
        listening.cancel()
        await tasks.aclose()
