"""The work of a step boundary: waves that are due are committed, then parts of transfers are launched."""

from collections import deque
from functools import partial

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.device import DeviceEvent
from async_eplb.errors import CommitFailed
from async_eplb.transport.base import PreparedExchange
from async_eplb.update.layer import Hop, LayerInFlight
from async_eplb.update.outcome import Failure
from async_eplb.update.progress import Progress
from async_eplb.update.rank import Rank
from async_eplb.update.stages import LayerStages
from async_eplb.workers import Work


class Boundary:
    """Carries out what was agreed, on the thread that launches the model's work or, where nobody serves, beside it."""

    def __init__(
        self, rank: Rank, stages: LayerStages, progress: Progress, shared: SharedAgreement, failure: Failure
    ) -> None:
        self._rank = rank
        self._stages = stages
        self._progress = progress
        self._shared = shared
        self._failure = failure
        self._launchable: deque[tuple[Hop, PreparedExchange]] = deque()
        self._num_parts_launched = 0

    def offer(self, layer: LayerInFlight) -> int:
        """Add a layer to what is launched at boundaries; return in how many parts."""
        parts = [(hop, part) for hop in layer.hops for part in hop.parts]
        self._launchable += parts
        return len(parts)

    def execute(self, decision: Decision, *, step: int) -> Exception | None:
        """Commit layers, then launch transfers, on the current stream. Does not block; never called twice at once.

        :param step: the boundary; 0 in the exclusive mode
        :returns: what went wrong with a commit, which the serving thread must raise; the update has then failed
        """
        try:
            return self._execute(decision, step=step)
        except BaseException as error:  # a signal's handler has raised it anywhere, say in the middle of a copy
            row = self._progress.rows[min(self._progress.copied, len(self._progress.rows) - 1)]
            self._failure.fail(self._hold_for(error, row, step))
            raise

    def _execute(self, decision: Decision, *, step: int) -> Exception | None:
        progress = self._progress  # rule 2: every rank does this at the boundary of the same number
        failure: Exception | None = None
        while progress.copied < decision.copied and not progress.copy_failed:
            layer = progress.layers[progress.copied]
            try:
                self._stages.copy(layer, step=step)
            except Exception as error:  # noqa: BLE001 - returned, and other ranks get to know
                failure = self._hold_for(error, layer.planned.row, step)
                self._failure.fail(failure)
                break
            try:
                self._rank.on_commit(layer.planned.committed(step))
            except Exception as error:  # noqa: BLE001 - likewise; what was agreed is committed all the same
                failure = failure or error
                self._failure.fail(error)  # before the commit counts, and may be the last that the update waits for
            finally:
                progress.copied += 1
        try:  # agreement rule 3: behind the commits, on the thread that launches the model's own work
            while self._num_parts_launched < decision.parts_launched and self._failure.error is None:
                self._stages.launch(*self._launchable.popleft())
                self._num_parts_launched += 1
        except Exception as error:  # noqa: BLE001 - the update fails, serving does not
            self._failure.fail(error)
        return failure

    async def execute_beside(self, decision: Decision, *, step: int, after: DeviceEvent) -> None:
        """Do the same while the model stands still: on the commit stream, until the device has done it.

        :param after: the model's last work
        """

        def execute() -> None:
            with self._stages.beside(after):
                self.execute(decision, step=step)

        try:
            await self._rank.workers.run(Work.COMMIT, execute)
        except Exception as error:  # noqa: BLE001 - the device failed
            row = self._progress.rows[min(self._progress.copied, len(self._progress.rows) - 1)]
            self._failure.fail(self._hold_for(error, row, 0))

    async def copy_again(self, layer: LayerInFlight) -> None:
        """Commit a layer from the staging that was kept of it, in a recovery.

        :raises CommitFailed: if it cannot be copied; its staging is kept for another try
        """
        try:
            await self._rank.workers.run(Work.COMMIT, partial(self._copy_beside, layer))
        except Exception as error:
            raise self._hold_for(error, layer.planned.row, 0) from error
        await self._stages.finish(layer)

    def _copy_beside(self, layer: LayerInFlight) -> None:
        with self._stages.beside(self._stages.callers_work):
            self._stages.copy(layer, step=0)
            self._progress.copied = self._progress.layers.index(layer) + 1
            self._rank.on_commit(layer.planned.committed(0))

    def _hold_for(self, cause: BaseException, row: int, step: int) -> CommitFailed:
        """Keep this rank from passing boundaries, because peers have committed a layer that it cannot commit."""
        self._progress.copy_failed = True
        error = CommitFailed(
            f"rank {self._rank.number}: layer {row} was agreed on and could not be copied ({cause}); this rank must "
            "not serve before recover(), which copies it anew",
            rank=self._rank.number,
            layer=row,
            step=step,
        )
        error.__cause__ = cause
        self._shared.hold(error)
        return error
