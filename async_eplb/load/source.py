"""Where a rebalancer gets loads from: what one rank has counted by a boundary, and its sum over all ranks."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.device import DeviceEvent
from async_eplb.errors import InvalidLoad
from async_eplb.load.value import ExpertLoad


class LoadGroup(Protocol):
    """Sums counts over the ranks of an EP group, away from the serving path."""

    num_ranks: int

    async def sum(self, counts: Tensor, after: DeviceEvent | None = None) -> Tensor:
        """Return the sum over all ranks: int64 on the CPU, in the shape of ``counts``, equal on every rank.

        All ranks call this equally often, with tensors of the same shape.

        :param counts: int64 on the CPU
        :param after: what fills ``counts``; without it, they are there
        :raises BrokenLoadGroup: if a rank does not take part in time
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadSnapshot:
    """What one rank has counted by one boundary.

    :param counts: int64 ``[parts, layers, logical + 1]`` on the CPU, filled when ``copied`` has passed: tokens of each
        logical expert, and in the last column of experts that the model does not have. Parts are added up; a part is
        a kind of steps, for example
    :param copied: recorded behind the copy
    :param num_steps: steps that were counted over
    :param phase: kind of these steps; None for all kinds
    """

    counts: Tensor
    copied: DeviceEvent
    num_steps: int
    phase: str | None = None

    async def summed(self, group: LoadGroup) -> ExpertLoad:
        """Return the load of all ranks together, which is equal on every rank. All ranks call this together.

        :raises InvalidLoad: if experts beyond the model's were recorded
        :raises BrokenLoadGroup: if a rank does not take part in time
        """
        counts = (await group.sum(self.counts, self.copied)).sum(dim=0).numpy()  # [layers, logical + 1]
        steps = await group.sum(torch.tensor([self.num_steps], device="cpu"))
        beyond = int(counts[:, -1].sum())
        if beyond:
            raise InvalidLoad(
                f"{beyond} recorded experts are beyond the {counts.shape[1] - 1} of the model; "
                "record physical experts with physical=True"
            )
        num_steps = -(-int(steps[0]) // group.num_ranks)  # the mean over ranks, rounded up
        return ExpertLoad.from_counts(counts[:, :-1], num_steps=max(1, num_steps), phase=self.phase)


class LoadSource(Protocol):
    """Counts tokens while the model serves; :class:`async_eplb.LoadWindow` is one, an engine's own counters another."""

    def snapshot(self, phase: str | None = None) -> LoadSnapshot:
        """Begin to copy what has been counted by now, and return at once, without waiting for the device.

        A rebalancer has this called at a boundary, by the thread that serves and on its stream; while that thread makes
        no steps, by another thread on another stream.

        :param phase: kind of steps; None for all kinds
        :raises InvalidOptions: if the phase is not counted
        """
        ...
