"""The caller's handle of an update that runs beside serving."""

from async_eplb.errors import BusyUpdater
from async_eplb.event_loop import HomeLoop
from async_eplb.update.run import UpdateRun
from async_eplb.update.summary import UpdateSummary


class UpdateHandle:
    """An update that runs while the model serves. Made by :meth:`ExpertUpdater.begin`, and used in its event loop."""

    def __init__(self, run: UpdateRun, home: HomeLoop) -> None:
        self._run = run
        self._home = home

    def __repr__(self) -> str:
        state = "done" if self.done else "running"
        progress = self._run.progress
        return f"<UpdateHandle {state}: {progress.copied} of {len(progress.rows)} layers committed>"

    @property
    def done(self) -> bool:
        """Whether the update has ended, one way or another."""
        return self._run.finished.is_set()

    def cancel(self) -> None:
        """End the update at the same layer on every rank, after what may be under way.

        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._home.require(self)
        self._run.cancel()

    async def wait(self) -> UpdateSummary:
        """Return when all layers are committed on every rank. Cancelling this does not cancel the update.

        :raises EplbError: if the update ended early; ``committed_layers`` says which layers are new
        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._home.require(self)
        await self._run.finished.wait()
        return self._run.summary()

    def result(self) -> UpdateSummary:
        """Return at once what :meth:`wait` returns, from any thread, once the update is :attr:`done`.

        :raises BusyUpdater: if it still runs
        :raises EplbError: as :meth:`wait`
        """
        if not self.done:
            raise BusyUpdater(f"{self!r} has no result yet")
        return self._run.summary()
