"""The caller's handle of an update that runs beside serving."""

from async_eplb.update.run import UpdateRun
from async_eplb.update.summary import UpdateSummary


class UpdateHandle:
    """An update that runs while the model serves. Made by :meth:`ExpertUpdater.begin`."""

    def __init__(self, run: UpdateRun) -> None:
        self._run = run

    def __repr__(self) -> str:
        state = "done" if self.done else "running"
        progress = self._run.progress
        return f"<UpdateHandle {state}: {progress.copied} of {len(progress.rows)} layers committed>"

    @property
    def done(self) -> bool:
        """Whether the update has ended, one way or another."""
        return self._run.finished.is_set()

    def cancel(self) -> None:
        """End the update at the same layer on every rank, after what may be under way."""
        self._run.cancel()

    async def wait(self) -> UpdateSummary:
        """Return when all layers are committed on every rank. Cancelling this does not cancel the update.

        :raises EplbError: if the update ended early; ``committed_layers`` says which layers are new
        """
        await self._run.finished.wait()
        return self._run.summary()
