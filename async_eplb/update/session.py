"""The task group that control rounds and updates run in, and the work of a rank that makes no steps.

The only task groups of the package are here and in ``update_run``.
"""

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from anyio import CancelScope, Lock, create_task_group
from anyio.abc import TaskGroup

from async_eplb.agreement.shared import Driver
from async_eplb.device import DeviceEvent
from async_eplb.update.run import UpdateRun
from async_eplb.workers import Doorbell, News, Workers


class LayerPipeline:
    """The task group that control rounds and updates run in. It is left when its last update has ended.

    :param doorbell: rung by threads that have news
    :param news: notified in the event loop when the doorbell rings
    """

    def __init__(self, driver: Driver, news: News, doorbell: Doorbell, workers: Workers) -> None:
        self._driver = driver
        self._news = news
        self._doorbell = doorbell
        self._workers = workers
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None
        self._run: UpdateRun | None = None
        self._listening = CancelScope(shield=True)
        self._standing_work = Lock()
        self._stood: DeviceEvent | None = None
        self._for_good = False

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(create_task_group())
        self._tasks.start_soon(self._listen)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the task group without telling it of the caller's error, which it would wrap in a group."""
        self._tasks = None
        self._listening.cancel()
        await self._stack.aclose()

    def start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a function in the background until it ends, whatever becomes of the caller."""
        if self._tasks is None:
            raise RuntimeError("the pipeline is not open")

        async def shielded() -> None:
            with CancelScope(shield=True):
                await function()

        self._tasks.start_soon(shielded)

    def start_update(self, run: UpdateRun) -> None:
        """Run an update in the background; what becomes of it is told by the run."""
        self._run = run
        self.start(run.run)

    def stand(self, after: DeviceEvent, *, for_good: bool = False) -> None:
        """From now on, do what is due although this rank makes no steps.

        :param after: the model's last work
        :param for_good: no step follows at all
        """
        self._stood = after
        self._for_good = for_good
        self._driver.stand(standing=True)

    async def stand_no_more(self) -> None:
        """Leave what is due to steps again; nothing is under way when this returns."""
        self._driver.stand(standing=False)
        with CancelScope(shield=True):
            async with self._standing_work:
                return

    async def _listen(self) -> None:
        with self._listening:
            while True:
                await self._doorbell.wait()
                self._news.notify()
                await self._do_due_work_while_standing()

    async def _do_due_work_while_standing(self) -> None:
        async with self._standing_work:
            decision = self._driver.due_while_standing(for_good=self._for_good)
            if decision is None or self._run is None or self._stood is None:
                return
            run = self._run
            execute = partial(run.execute_beside, decision, step=self._driver.step + 1, after=self._stood)
            with CancelScope(shield=True):
                try:
                    await self._workers.run("commit", execute)
                except Exception as error:  # noqa: BLE001 - told by the update; who listens goes on
                    run.tear(error)
            self._news.notify()
