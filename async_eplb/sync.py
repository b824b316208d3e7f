"""The updater for engines without an event loop: a loop of its own in another thread, steps on the caller's."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from async_eplb.device import Device
from async_eplb.events.emit import Logger
from async_eplb.expert_map import ExpertMap, LayerCommit
from async_eplb.map_tables import MapTables
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.state import Recovery
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.update.handle import UpdateHandle
from async_eplb.update.summary import UpdaterStatistics, UpdateSummary
from async_eplb.updater import ExpertUpdater
from async_eplb.verify.audit import AuditReport
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

T = TypeVar("T")


class SyncUpdateHandle:
    """An :class:`UpdateHandle` for threads without an event loop."""

    def __init__(self, handle: UpdateHandle, portal: BlockingPortal) -> None:
        self._handle = handle
        self._portal = portal

    @property
    def done(self) -> bool:
        """Whether the update has ended, one way or another."""
        return self._handle.done

    def cancel(self) -> None:
        """Do what :meth:`UpdateHandle.cancel` does."""
        self._portal.call(self._handle.cancel)

    def wait(self) -> UpdateSummary:
        """Block until :meth:`UpdateHandle.wait` returns. Another thread, or :meth:`SyncUpdater.idle`, must step."""
        return self._portal.call(self._handle.wait)


class SyncUpdater:
    """An :class:`ExpertUpdater` in a context manager of its own event loop, which runs in a thread.

    ``with SyncUpdater(weights, placement, topology, rank=r, transport=t) as updater: updater.step()``. Steps run on
    the calling thread, as the model's work does; everything else runs in the loop's. Parameters are those of
    :class:`ExpertUpdater`, and one more.

    :param backend: event loop, as anyio calls it
    :raises EplbError: as :class:`ExpertUpdater`
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
        backend: str = "asyncio",
    ) -> None:
        self.updater = ExpertUpdater(
            weights,
            placement,
            topology,
            rank=rank,
            name=name,
            transport=transport,
            options=options,
            on_commit=on_commit,
            tables=tables,
            logger=logger,
            workers=workers,
            device=device,
        )
        """For what has no synchronous form; its coroutines run in the loop of this thread only."""
        self._backend = backend
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(self._backend))
            stack.enter_context(self._portal.wrap_async_context_manager(self.updater))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<SyncUpdater of {self.updater!r}>"

    @property
    def options(self) -> UpdateOptions:
        """How this updater works."""
        return self.updater.options

    @property
    def topology(self) -> EPTopology:
        """Shape of the EP group."""
        return self.updater.topology

    @property
    def name(self) -> str | None:
        """Tells this updater from others of its group."""
        return self.updater.name

    @property
    def rank(self) -> int:
        """This process in the EP group."""
        return self.updater.rank

    @property
    def run_id(self) -> str:
        """Names this updater's life in logs; equal on all its ranks."""
        return self.updater.run_id

    @property
    def expert_map(self) -> ExpertMap:
        """Published maps, which routers read; their addresses never change."""
        return self.updater.expert_map

    @property
    def device(self) -> Device:
        """Streams and events of the live weights."""
        return self.updater.device

    @property
    def placement(self) -> ExpertPlacement:
        """The placement that the live weights have, as far as committed."""
        return self.updater.placement

    def statistics(self) -> UpdaterStatistics:
        """Return what this updater has done so far."""
        return self.updater.statistics()

    def step(self, number: int | None = None) -> None:
        """Pass a step boundary on the calling thread; see :meth:`ExpertUpdater.step`."""
        self.updater.step_sync(number)

    def update(self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None) -> UpdateSummary:
        """Block until :meth:`ExpertUpdater.update` returns."""
        after = self.device.record()

        async def update() -> UpdateSummary:
            return await self.updater.update(new_placement, layers=layers, after=after)

        return self._call(update)

    def begin(
        self,
        new_placement: ExpertPlacement,
        *,
        layers: Iterable[int] | None = None,
        max_nbytes_per_step: int | None = None,
    ) -> SyncUpdateHandle:
        """Begin an update and go on stepping; see :meth:`ExpertUpdater.begin`."""
        after = self.device.record()

        async def begin() -> UpdateHandle:
            return self.updater.begin(
                new_placement, layers=layers, max_nbytes_per_step=max_nbytes_per_step, after=after
            )

        return SyncUpdateHandle(self._call(begin), self._open_portal())

    def recover(self, surviving_group: Transport, *, source: WeightSource | None = None) -> Recovery:
        """Block until :meth:`ExpertUpdater.recover` returns."""

        async def recover() -> Recovery:
            return await self.updater.recover(surviving_group, source=source)

        return self._call(recover)

    def rebind(self, weights: ExpertWeights) -> None:
        """Take other tensors in place of the live weights, inside :meth:`paused`; see :meth:`ExpertUpdater.rebind`."""

        async def rebind() -> None:
            await self.updater.rebind(weights)

        self._call(rebind)

    def audit(self, group: Transport) -> AuditReport:
        """Block until :meth:`ExpertUpdater.audit` returns."""

        async def audit() -> AuditReport:
            return await self.updater.audit(group)

        return self._call(audit)

    def idle(self) -> AbstractContextManager[None]:
        """Make no steps inside; see :meth:`ExpertUpdater.idle`."""
        return self._open_portal().wrap_async_context_manager(self.updater.idle(after=self.device.record()))

    def paused(self) -> AbstractContextManager[None]:
        """Let nothing touch live weights inside; see :meth:`ExpertUpdater.paused`."""
        return self._open_portal().wrap_async_context_manager(self.updater.paused(after=self.device.record()))

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        return self._open_portal().call(function)

    def _open_portal(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("enter the SyncUpdater first")
        return self._portal
