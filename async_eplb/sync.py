"""The updater for engines without an event loop: a loop of its own in another thread, steps on the caller's."""

import atexit
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import BusyUpdater
from async_eplb.event_loop import BackgroundTask, LoopThread
from async_eplb.events.emit import Logger
from async_eplb.events.schema import LayerCommitted
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

_EXIT_S = 1.0
"""How long the interpreter's end waits for an updater that nobody has left."""


class SyncUpdateHandle:
    """An :class:`UpdateHandle` for threads without an event loop."""

    def __init__(self, handle: UpdateHandle, loop: LoopThread) -> None:
        self._handle = handle
        self._loop = loop

    def __repr__(self) -> str:
        return f"<SyncUpdateHandle of {self._handle!r}>"

    @property
    def done(self) -> bool:
        """Whether the update has ended, one way or another."""
        return self._handle.done

    def cancel(self) -> None:
        """Do what :meth:`UpdateHandle.cancel` does."""

        async def cancel() -> None:
            self._handle.cancel()

        if not self.done:
            self._loop.call(cancel)

    def wait(self) -> UpdateSummary:
        """Block until :meth:`UpdateHandle.wait` returns. Another thread, or :meth:`SyncUpdater.idle`, must step."""
        return self.result() if self.done else self._loop.call(self._handle.wait)

    def result(self) -> UpdateSummary:
        """Return at once what :meth:`wait` returns, once the update is :attr:`done`; as :meth:`UpdateHandle.result`."""
        return self._handle.result()


class SyncUpdater:
    """An :class:`ExpertUpdater` in a context manager of its own event loop, which runs in a thread.

    ``with SyncUpdater(weights, placement, topology, rank=r, transport=t) as updater: updater.step()``. Steps run on
    the calling thread, as the model's work does; everything else runs in the loop's. Any thread may call its methods,
    but for those of the event loop. One that is never left does not keep the process from ending: the other ranks are
    told, and a second later at most it is given up. Parameters are those of :class:`ExpertUpdater`, and one more.

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
        """For what has no synchronous form; see :meth:`call`."""
        self.loop = LoopThread(backend)
        """The event loop and its thread."""
        self._life: BackgroundTask | None = None

    def __enter__(self) -> Self:
        if self._life is not None:
            raise BusyUpdater(f"{self!r} was entered before")
        self.device.record().synchronize()  # updates that begin in the event loop's thread find the weights written
        self.loop.start()
        try:
            self._life = self.loop.hold(self.updater)
        except BaseException:
            self.loop.stop(_EXIT_S)  # connecting cannot be cancelled
            raise
        atexit.register(self._leave_at_exit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._life is not None:
            failure = self._life.end()
            atexit.unregister(self._leave_at_exit)
            self.loop.stop()
            if failure is not None:
                raise failure

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
    def reserved_nbytes(self) -> int:
        """Bytes of device memory that this updater holds while open; see :attr:`ExpertUpdater.reserved_nbytes`."""
        return self.updater.reserved_nbytes

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

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Block until an asynchronous function has run in this updater's event loop, and return its result.

        :raises ClosedUpdater: if this is not entered, or left meanwhile
        :raises WrongEventLoop: in the thread of the event loop
        """
        return self.loop.call(function)

    def update(self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None) -> UpdateSummary:
        """Block until :meth:`ExpertUpdater.update` returns."""
        after = self.device.record()
        return self.call(partial(self.updater.update, new_placement, layers=layers, after=after))

    def stream(
        self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None
    ) -> Generator[LayerCommitted, None, None]:
        """Do what :meth:`update` does, and yield each layer as it lands; see :meth:`ExpertUpdater.stream`."""
        landings = self.updater.stream(new_placement, layers=layers, after=self.device.record())
        try:
            while (committed := self.call(partial(anext, landings, None))) is not None:
                yield committed
        finally:
            self.call(landings.aclose)

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

        return SyncUpdateHandle(self.call(begin), self.loop)

    def recover(self, surviving_group: Transport, *, source: WeightSource | None = None) -> Recovery:
        """Block until :meth:`ExpertUpdater.recover` returns."""
        return self.call(partial(self.updater.recover, surviving_group, source=source))

    def rebind(self, weights: ExpertWeights) -> None:
        """Take other tensors in place of the live weights, inside :meth:`paused`; see :meth:`ExpertUpdater.rebind`."""
        self.call(partial(self.updater.rebind, weights))

    def audit(self, group: Transport) -> AuditReport:
        """Block until :meth:`ExpertUpdater.audit` returns."""
        return self.call(partial(self.updater.audit, group))

    def idle(self, *, after: DeviceEvent | None = None) -> AbstractContextManager[None]:
        """Make no steps inside; see :meth:`ExpertUpdater.idle`."""
        return self._held(self.updater.idle(after=after or self.device.record()))

    @contextmanager
    def paused(self, *, after: DeviceEvent | None = None) -> Iterator[None]:
        """Let nothing touch live weights inside; see :meth:`ExpertUpdater.paused`.

        The end of the body waits for the device: updates may begin in another thread, behind what it has written.
        """
        with self._held(self.updater.paused(after=after or self.device.record())):
            try:
                yield
            finally:
                self.device.record().synchronize()

    @contextmanager
    def _held(self, context: AbstractAsyncContextManager[None]) -> Iterator[None]:
        held = self.loop.hold(context)
        try:
            yield
        finally:
            failure = held.end()
        if failure is not None:
            raise failure

    def _leave_at_exit(self) -> None:
        with suppress(TimeoutError):
            if self._life is not None:
                self._life.end(_EXIT_S)
            self.loop.stop(_EXIT_S)
