"""When all ranks make their next rebalance: at a step, or when one of them demands it."""

from collections.abc import Callable

from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import ClosedUpdater
from async_eplb.event_loop import HomeLoop


class RebalanceDemands:
    """Demands of rebalances, which control rounds carry to all ranks. Rebalances are counted from 1.

    :param closed: returns why no rebalance follows; empty if one can
    :param paused: returns whether this rank is inside ``paused()``
    :param home: the only event loop to wait in; any thread may demand
    """

    def __init__(
        self, shared: SharedAgreement, closed: Callable[[], str], paused: Callable[[], bool], home: HomeLoop
    ) -> None:
        self._shared = shared
        self._closed = closed
        self._paused = paused
        self._home = home

    def demand(self, number: int) -> None:
        """Ask all ranks to make their rebalance ``number``."""
        self._shared.demand(number)

    async def until_demanded(self, number: int, *, due_step: int | None) -> None:
        """Return when some rank has demanded rebalance ``number``; demand it when boundary ``due_step`` is passed.

        :raises ClosedUpdater: if no rebalance follows
        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._home.require(self)

        def demanded() -> bool:
            return self._shared.outlook.demanded >= number or bool(self._closed())

        if due_step is None:
            await self._shared.until(demanded)
        else:
            await self._shared.until_step(due_step, unless=demanded)
            self.demand(number)
        if self._closed():
            raise ClosedUpdater(f"no rebalance {number} follows: {self._closed()}")

    async def until_unpaused(self) -> None:
        """Return when this rank is not inside ``paused()``, so that an update can begin.

        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._home.require(self)
        await self._shared.until(lambda: not self._paused())

    async def until_step(self, number: int) -> None:
        """Return when this rank has passed boundary ``number``, counted as ``step()`` does, or makes no steps.

        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._home.require(self)
        await self._shared.until_step(number, unless=lambda: self._shared.outlook.standing)
