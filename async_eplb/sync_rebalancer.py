"""The background task for engines without an event loop."""

from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType
from typing import Self

from anyio import CancelScope

from async_eplb.errors import BusyUpdater, ClosedRebalancer
from async_eplb.event_loop import BackgroundTask, Started, run_soon
from async_eplb.events.emit import Logger
from async_eplb.load.source import LoadGroup, LoadSource
from async_eplb.policy import PlacementPolicy, RebalanceTerms
from async_eplb.rebalancer import Rebalance, RebalanceOptions, Rebalancer, RebalancerStatistics
from async_eplb.sync import SyncUpdater
from async_eplb.workers import Workers


class SyncDemand:
    """A rebalance that was demanded. Made by :meth:`SyncRebalancer.demand`."""

    def __init__(self, rebalance: Future[Rebalance]) -> None:
        self._rebalance = rebalance

    @property
    def done(self) -> bool:
        """Whether it was made, or never will be."""
        return self._rebalance.done()

    def wait(self) -> Rebalance:
        """Block until the rebalance is made, and return what it did here. Another thread must step.

        :raises ClosedRebalancer: if the rebalancer does not run, or ends before
        :raises RebalanceFailed: if it fails
        """
        try:
            return self._rebalance.result()
        except CancelledError as error:
            raise ClosedRebalancer("the updater was left before the rebalance was made") from error


class SyncRebalancer:
    """A :class:`Rebalancer` that runs in the event loop of a :class:`SyncUpdater`. Any thread may call its methods.

    ``with SyncRebalancer(updater, window, policy, group=g, terms=t): ...`` rebalances inside; :meth:`start` and
    :meth:`close` do the same. Parameters are those of :class:`Rebalancer`. A load group is opened by
    ``updater.call(GlooLoadGroup.open)``.

    :param updater: moves the weights; it is entered before this is started, and left after this is closed
    """

    def __init__(
        self,
        updater: SyncUpdater,
        source: LoadSource,
        policy: PlacementPolicy,
        *,
        group: LoadGroup,
        terms: RebalanceTerms,
        options: RebalanceOptions | None = None,
        logger: Logger | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._rebalancer = Rebalancer(
            updater.updater,
            source,
            policy,
            group=group,
            terms=terms,
            options=options,
            logger=logger,
            workers=workers,
        )
        self._loop = updater.loop
        self._task: BackgroundTask | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"the rebalancer had failed before: {failure!r}")

    def __repr__(self) -> str:
        return f"<SyncRebalancer of {self._rebalancer!r}>"

    @property
    def options(self) -> RebalanceOptions:
        """When a rebalance begins and how it runs."""
        return self._rebalancer.options

    def start(self) -> None:
        """Begin to rebalance in the background. What goes wrong there ends it; :meth:`close` raises it.

        :raises BusyUpdater: if it runs already
        :raises ClosedUpdater: if the updater is not entered
        """
        if self._task is not None and not self._task.done:
            raise BusyUpdater(f"{self!r} runs already")
        self._task = self._loop.start_task(self._run)

    def demand(self) -> SyncDemand:
        """Demand a rebalance on all ranks, and return at once; see :meth:`Rebalancer.rebalance_now`.

        :raises ClosedUpdater: if the updater is not entered
        """
        return SyncDemand(self._loop.begin(self._rebalancer.rebalance_now))

    def statistics(self) -> RebalancerStatistics:
        """Return what has been done so far; ``failure`` says what ended it."""
        return self._rebalancer.statistics()

    def close(self) -> None:
        """End what runs in the background, and wait for that. An update that has begun goes on.

        :raises Exception: what ended it before, the first time that this is called
        """
        task, self._task = self._task, None
        failure = None if task is None else task.end()
        if failure is not None:
            raise failure

    async def _run(self, started: Started) -> None:
        with CancelScope() as scope:
            started(partial(run_soon(), scope.cancel))
            await self._rebalancer.run()
