"""Calls of functions at the next boundary, on the thread that serves and on its stream."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from anyio import move_on_after

from async_eplb.agreement.shared import SharedAgreement
from async_eplb.device import DeviceEvent
from async_eplb.errors import ClosedUpdater
from async_eplb.update.session import Session
from async_eplb.workers import Work

T = TypeVar("T")

PATIENCE_S = 1.0
"""How long a call waits for a boundary. Other ranks may wait for what it returns, and traffic may pause for hours."""


class BoundaryCalls:
    """Calls functions at boundaries for the event loop: what reads the model's state does so in the model's order."""

    def __init__(self, shared: SharedAgreement, session: Session) -> None:
        self._shared = shared
        self._session = session
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    async def at_boundary(self, function: Callable[[], T]) -> T:
        """Have a function called at the next boundary, inside ``step()``; return what it returned.

        While this rank makes no steps, the function is called in another thread, on the commit stream: in ``idle()``
        and ``paused()`` behind the model's last work, otherwise when no step has come for a second, beside whatever
        the model does. What it raises is raised here, never out of ``step()``. It must not wait for the device.

        :raises ClosedUpdater: if no rebalance follows
        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._session.life.home.require(self)
        call: Future[T] = Future()
        waiting = (function, call)
        self._waiting.append(waiting)
        session = self._session
        try:
            with move_on_after(PATIENCE_S):
                await self._shared.until(lambda: call.done() or session.stood is not None or bool(session.closed))
        finally:
            withdrawn = self._withdraw(waiting)
        if not withdrawn:  # the serving thread has begun it
            await self._shared.until(call.done)
            return call.result()
        if session.closed:
            raise ClosedUpdater(f"nothing is called at a boundary any more: {session.closed}")
        return await self._session.rank.workers.run(Work.LOAD, partial(self._beside, function, session.stood))

    def make(self) -> None:
        """Make the calls that wait; the serving thread does this at each boundary."""
        while self._waiting:
            try:
                function, call = self._waiting.popleft()
            except IndexError:  # it was withdrawn in this moment
                return
            try:
                call.set_result(function())
            except Exception as error:  # noqa: BLE001 - raised to who wanted the call; serving goes on
                call.set_exception(error)
            self._shared.ring()

    def _withdraw(self, waiting: tuple[Callable[[], Any], Future[Any]]) -> bool:
        try:
            self._waiting.remove(waiting)
        except ValueError:
            return False
        return True

    def _beside(self, function: Callable[[], T], after: DeviceEvent | None) -> T:
        device = self._session.rank.device
        with device.committing():
            if after is not None:
                device.wait(after)
            return function()
