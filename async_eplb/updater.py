"""The façade: move live expert weights to a new placement, alone or while the model serves."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from anyio.lowlevel import checkpoint

from async_eplb.agreement.rules import Mode
from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import BusyUpdater, ClosedUpdater
from async_eplb.events.emit import Logger, guarded
from async_eplb.events.schema import LayerCommitted
from async_eplb.expert_map import LayerCommit
from async_eplb.map_tables import MapTables
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.reopen import reopen
from async_eplb.recovery.state import Attempts, Recovery
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.update.admission import Request, admit_rank, rebound
from async_eplb.update.handle import UpdateHandle
from async_eplb.update.rank import Rank
from async_eplb.update.run import UpdateRun
from async_eplb.update.summary import UpdateSummary
from async_eplb.update.views import UpdaterViews
from async_eplb.verify.audit import AuditReport, audit_replicas
from async_eplb.weights import ExpertWeights
from async_eplb.workers import OtherWorkers, ThreadWorkers, Workers


class ExpertUpdater(UpdaterViews):
    """Moves the expert weights of one model to new placements, with the other ranks of its EP group.

    An async context manager: entering connects, which all ranks do together; leaving waits for a running update
    to end, cancelled. Enter and leave it in the same task. Entering raises :class:`OpenTimeout` if not all come,
    :class:`UpdaterMismatch` if they are not the same, and :class:`BusyGroup` if its name is taken in the group.

    It belongs to the event loop that it was entered in: others get :class:`WrongEventLoop`. Only :meth:`step_sync` and
    what can be read are for any thread.

    :param weights: live weights of this rank
    :param placement: the placement that they have now
    :param topology: shape of the EP group
    :param rank: this process in the EP group
    :param name: tells it from other updaters of that group, such as those of a target and a draft model; equal on all
        ranks, which compare it when they open. One updater of a group may have none. Events have it as ``updater``
    :param transport: an unused transport of that group; the updater opens and closes it
    :param on_commit: called right after a layer's commit is enqueued, in the same thread and stream, with the layer
        and its new maps on the host; for state derived from weights, such as fused scales, and an engine's own copies
        of maps. It must not wait for the device
    :param tables: an engine's tensors that maps are published into, and no others; without it, four are made
    :param logger: for events, such as one of structlog; the application's without it. What it raises is counted
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
        name: str | None = None,
        transport: Transport,
        options: UpdateOptions | None = None,
        on_commit: Callable[[LayerCommit], None] | None = None,
        tables: MapTables | None = None,
        logger: Logger | None = None,
        workers: Workers | None = None,
        device: Device | None = None,
    ) -> None:
        admitted = admit_rank(
            weights,
            placement,
            topology,
            number=rank,
            name=name,
            transport=transport,
            options=options or UpdateOptions(),
            on_commit=on_commit or (lambda _commit: None),
            tables=tables,
            logger=guarded(logger, run_id=transport.run_id, updater=name),
            workers=workers or ThreadWorkers(),
            device=device,
        )
        super().__init__(self._equipped(admitted), placement, transport)
        self._attempts = Attempts()

    def _equipped(self, rank: Rank) -> Rank:
        """Return the rank, some of whose parts a subclass may replace, such as its committer."""
        return rank

    async def __aenter__(self) -> Self:
        await self._session.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.home.require(self)
        await self._session.aclose()

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
        await run.join()
        return run.summary()

    async def stream(
        self,
        new_placement: ExpertPlacement,
        *,
        layers: Iterable[int] | None = None,
        after: DeviceEvent | None = None,
    ) -> AsyncGenerator[LayerCommitted, None]:
        """Do what :meth:`update` does, and yield each layer as it lands on this rank.

        Leaving the loop early cancels the update (close the iterator, as with ``contextlib.aclosing``).
        """
        run = self._begin(Mode.EXCLUSIVE, new_placement, layers, after=after)
        async with aclosing(run.landings()) as landings:
            async for committed in landings:
                yield committed

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
            without effect while this rank makes no steps
        :param after: work on the device that wrote live weights last; without it, what this thread's current stream
            has now
        :raises EplbError: as :meth:`update`, for what is refused
        """
        run = self._begin(Mode.SERVING, new_placement, layers, max_nbytes_per_step=max_nbytes_per_step, after=after)
        return UpdateHandle(run, self.home)

    async def step(self, number: int | None = None) -> None:
        """Pass a step boundary: call this once before every forward pass on every rank, dummy passes included.

        Layers that are due here are committed now, on the current stream of this thread, which must be the one
        that the model's work is launched from. Waits for nothing in a normal run; while an update runs, it gives
        other tasks of the event loop one turn. If it is cancelled, the boundary has not been passed.

        :param number: the engine's global number of the pass, if it has one: from 1, 1 more each time, equal on all
            ranks. A rank that skips or repeats one ends the running update on all ranks, with :class:`SkippedPass` on
            its handle. Without numbers, only ``max_step_skew`` finds such a rank
        :raises StepMismatch: if ``number`` is no whole number of at least 1
        :raises RankInDoubt: if this boundary's fence was lost with a rank
        :raises BusyUpdater: inside :meth:`idle` or :meth:`paused`, or while another task is in ``step()``
        :raises Exception: what ``on_commit`` raised
        """
        self.home.require(self)
        if self._session.running is not None:
            await checkpoint()
        await self._stepper.step(number)

    def step_sync(self, number: int | None = None) -> None:
        """Do what :meth:`step` does on any thread, with a plain wait."""
        self._stepper.step_sync(number)

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
        :raises MovedWeights: at the end, if weights are not where they were and were not rebound; the pause is over
        """
        async with self._standing("paused", after):  # rule 16
            if self._session.running is not None:
                await self._session.running.finished.wait()
            yield
        self._rank.live.require_in_place()

    async def rebind(self, weights: ExpertWeights) -> None:
        """Take other tensors in place of the live weights, inside :meth:`paused`. All ranks call this together.

        For a load that gives parameters other memory. Layouts must be equal; experts must lie as :attr:`placement`
        says. The old tensors may be freed when this has returned on all ranks. Not cancelled.

        :raises InvalidWeights: if layout, rows or device are not those of the weights before; nothing has changed
        :raises BusyUpdater: outside of :meth:`paused`
        :raises ClosedUpdater: if this updater is not open
        :raises IpcUnavailable: if a transport that reads peers' weights cannot read the new ones;
            :class:`OpenTimeout` if a rank did not call this; ``recover()`` goes on with another transport
        """
        self.home.require(self)
        if self._session.closed:
            raise ClosedUpdater(f"{self!r} cannot rebind weights")
        if not self.paused_now or self.running is not None:
            raise BusyUpdater(f"{self!r}: weights can be replaced inside paused() only, when no update is under way")
        await self._session.rebind(lambda: self._equipped(rebound(self._rank, weights)))

    async def recover(self, surviving_group: Transport, *, source: WeightSource | None = None) -> Recovery:
        """Go on with the ranks that are left after a failure; all call this together, and none serves meanwhile.

        Layers are compared and the ones in doubt committed from kept staging, so that weights and maps agree on every
        survivor. Slots of ranks that are gone become empty: physical experts keep their numbers, published maps their
        shape and addresses, and :attr:`rank` stays. Passes go on after the boundary that the rank which was ahead has
        passed (:attr:`Recovery.step`). Not cancelled: it waits ``open_timeout_s`` for all to come, and then ends within
        a few times ``control_timeout_s``.

        :param surviving_group: an unused transport between the survivors, in the order of their ranks; of all ranks
            if none is gone
        :param source: where experts are loaded from that no survivor holds
        :raises ClosedUpdater: if this updater was left, or never entered
        :raises BusyUpdater: inside a step, :meth:`idle` or :meth:`paused`
        :raises Unrecoverable: if a survivor cannot follow the others
        :raises BrokenControlGroup: if another rank is lost meanwhile; call this again without it
        """
        self.home.require(self)
        self._session.life.require_entered(f"{self!r} cannot recover")
        self._rank.live.require_in_place()
        with self._stepper.standing("recovering"):
            return await reopen(self._rank, self._session, self._shared, self._attempts, surviving_group, source)

    async def audit(self, group: Transport) -> AuditReport:
        """Compare the bytes of all replicas of all experts across ranks; all ranks call this together.

        Reads every slot once, on the device, and sends 8 bytes for each. Layers must stay as they are meanwhile.

        :param group: an unused transport between the ranks, used for one control round and closed
        :raises BusyUpdater: if an update is running
        :raises ClosedUpdater: if this updater is not open
        """
        self.home.require(self)
        self._session.life.require_entered(f"{self!r} cannot audit")
        if self.running is not None:
            raise BusyUpdater(f"{self!r}: an audit reads what an update changes; wait for its end")
        self._rank.live.require_in_place()
        return await audit_replicas(
            self._rank.live,
            self.placement,
            self.topology,
            members=[rank for rank in range(self.topology.num_ranks) if rank not in self._session.state.gone],
            rank=self.rank,
            group=group,
            device=self._rank.device,
            workers=OtherWorkers(self._rank.workers, "audit"),  # this updater's own rounds go on
            control_timeout_s=self.options.control_timeout_s,
            open_timeout_s=self.options.open_timeout_s,
            identity=replace(self._rank.identity, name=f"audit of {self.name or 'the updater without a name'}"),
        )

    def _begin(
        self,
        mode: Mode,
        new_placement: ExpertPlacement,
        layers: Iterable[int] | None,
        *,
        max_nbytes_per_step: int | None = None,
        after: DeviceEvent | None = None,
    ) -> UpdateRun:
        self.home.require(self)
        after = after or self.device.record()
        request = Request(
            mode=mode, new=new_placement, layers=layers, max_nbytes_per_step=max_nbytes_per_step, after=after
        )
        if self.closed:
            raise ClosedUpdater(f"{self!r} cannot update")
        if self.running is not None:
            raise BusyUpdater(f"{self!r}: wait for the running update before the next one")
        if self.paused_now:
            raise BusyUpdater(f"{self!r} is paused: an update can begin when it is not")
        return self._session.start_update(request)

    @asynccontextmanager
    async def _standing(self, reason: str, after: DeviceEvent | None) -> AsyncIterator[None]:
        self.home.require(self)
        if self.closed:
            raise ClosedUpdater(f"{self!r} cannot be {reason}")
        try:
            with self._stepper.standing(reason):
                try:
                    self._session.stand(after or self._rank.device.record())
                    yield
                finally:
                    await self._session.stand_no_more()
        finally:
            self._shared.news.notify()
