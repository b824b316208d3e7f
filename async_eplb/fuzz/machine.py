"""The machine of a simulated rank: tasks for worker threads, a device that runs out of memory, copies that fail."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio
import torch
from torch import Tensor

from async_eplb.commit.committer import Committer, PreparedCommit
from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.expert_map import LayerMaps
from async_eplb.fuzz.scenario import Mishap, Trouble
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import LayerPlan
from async_eplb.staging import StagingBuffer
from async_eplb.topology import EPTopology
from async_eplb.update.rank import Rank
from async_eplb.updater import ExpertUpdater
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Doorbell, LoopDoorbell

T = TypeVar("T")


class SimulatedWorkers:
    """Workers without threads: a function runs after a random time, and its result is returned after another.

    :param troubles: those of this rank
    """

    def __init__(self, rng: random.Random, troubles: tuple[Trouble, ...]) -> None:
        self._random = rng
        self._turns: dict[str, anyio.Lock] = {}
        self._counts: dict[str, int] = {}
        self._failing = {(t.work, t.count) for t in troubles if t.mishap is Mishap.FAIL_WORK}
        self._slow: Mapping[str, float] = {t.work: t.seconds for t in troubles if t.mishap is Mishap.SLOW_WORK}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` between two random times, one of a kind at a time."""
        async with self._turns.setdefault(kind, anyio.Lock()):
            with anyio.CancelScope(shield=True):
                await self._pass_time(kind)
                count = self._counts.get(kind, 0)
                self._counts[kind] = count + 1
                if (kind, count) in self._failing:
                    raise OSError(f"simulated: work {kind} {count} failed")
                result = function()
                await self._pass_time(kind)
            return result

    async def _pass_time(self, kind: str) -> None:
        if kind in self._slow:
            await anyio.sleep(min(self._slow[kind], 0.2))
        elif self._random.random() < 0.5:  # noqa: PLR2004 - a share
            await anyio.sleep(self._random.uniform(0, 0.02))

    def doorbell(self) -> Doorbell:
        """Return a doorbell inside the event loop."""
        return LoopDoorbell()


class _NotKnownToHavePassed:
    """An event that has passed, but whose ``query`` does not show it: it must be waited for, as on a GPU."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        return


class SimulatedDevice(CpuDevice):
    """A CPU whose new memory is filled with ones, so that use before writing shows, and which can run out of memory.

    Every other event must be waited for, as on a GPU.
    """

    def __init__(self, troubles: tuple[Trouble, ...]) -> None:
        self._num_events = 0
        self._count = 0
        self._failing = {t.count for t in troubles if t.mishap is Mishap.FAIL_ALLOCATION}

    def record(self) -> DeviceEvent:
        """Return an event that has passed, or one that must be waited for."""
        self._num_events += 1
        return _NotKnownToHavePassed() if self._num_events % 2 else super().record()

    def allocate(self, nbytes: int) -> Tensor:
        """Return memory full of ones: uint8 ``[nbytes]``.

        :raises MemoryError: if the troubles say so for this allocation
        """
        count = self._count
        self._count += nbytes > 0
        if nbytes and count in self._failing:
            raise MemoryError("simulated: out of memory")
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class FailingCommit:
    """A commit that fails half way if its layer is among those that are to fail.

    :param failing: layers whose next commit fails, of all commits of the rank
    :param one_slot: live and staged bytes of each tensor of one slot; empty if the layer has no staged slots
    """

    commit: PreparedCommit
    row: int
    failing: set[int]
    one_slot: Sequence[tuple[Tensor, Tensor]]

    def run(self) -> int:
        """Commit the layer, or write one slot and fail.

        :raises OSError: if it fails
        """
        if self.row in self.failing and self.one_slot:
            self.failing.discard(self.row)
            for live, staged in self.one_slot:
                live.copy_(staged)
            raise OSError("simulated: a copy failed")
        return self.commit.run()


class SimulatedUpdater(ExpertUpdater):
    """An updater whose commits may fail half way.

    :param parts: what else :class:`ExpertUpdater` takes
    """

    def __init__(
        self,
        weights: ExpertWeights,
        placement: ExpertPlacement,
        topology: EPTopology,
        troubles: tuple[Trouble, ...],
        **parts: Any,  # noqa: ANN401 - as the updater has them
    ) -> None:
        self._troubles = troubles
        super().__init__(weights, placement, topology, **parts)

    def _equipped(self, rank: Rank) -> Rank:
        return replace(rank, committer=FailingCommitter(rank.committer, rank.weights, self._troubles))


class FailingCommitter:
    """Commits, except that the first commit of each layer that the troubles name fails half way."""

    def __init__(self, committer: Committer, live: ExpertWeights, troubles: tuple[Trouble, ...]) -> None:
        self._committer = committer
        self._live = live
        self._failing = {t.layer for t in troubles if t.mishap is Mishap.TEAR}

    def scratch_nbytes(self, row: int) -> int:
        """Return the bytes of scratch of the committer that this one uses."""
        return self._committer.scratch_nbytes(row)

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> FailingCommit:
        """Prepare the committer's commit, and what is written if it fails."""
        one_slot = [
            (live, staged)
            for slot in plan.staged_slots[:1]
            for live, staged in zip(self._live.slot_views(row, slot), buffer.views(slot), strict=True)
        ]
        return FailingCommit(self._committer.prepare(row, plan, buffer, maps), row, self._failing, one_slot)
