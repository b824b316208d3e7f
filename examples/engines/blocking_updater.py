"""An ExpertUpdater for engines whose scheduler is a plain loop: its event loop runs in a thread beside it."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from async_eplb import ExpertPlacement, ExpertUpdater, UpdateSummary


class BlockingUpdater:
    """Opens an updater on entering, closes it on leaving, and updates while the caller waits.

    :param updater: not entered yet
    """

    def __init__(self, updater: ExpertUpdater) -> None:
        self.updater = updater
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(self._portal.wrap_async_context_manager(self.updater))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)

    def update(self, new_placement: ExpertPlacement, layers: Sequence[int]) -> UpdateSummary:
        """Do what ``ExpertUpdater.update`` does.

        :raises EplbError: as that does
        """
        if self._portal is None:
            raise RuntimeError("enter the updater before its first update")
        return self._portal.call(partial(self.updater.update, new_placement, layers=layers))
