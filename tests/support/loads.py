"""Sums of loads over ranks that share one event loop, and what a window has counted."""

import anyio
import torch
from torch import Tensor

from async_eplb.device import CpuDevice
from async_eplb.load.group import LocalLoadGroup
from async_eplb.load.window import LoadWindow
from async_eplb.testing.workers import ScheduledWorkers


def local_group() -> LocalLoadGroup:
    """Return the group of a rank alone, without threads."""
    return LocalLoadGroup(CpuDevice(), ScheduledWorkers())


def counted(window: LoadWindow, phase: str | None = None) -> list[list[int]]:
    """Return what one rank has counted over the window: ``[layers, logical]``."""
    tokens: list[list[int]] = anyio.run(window.gather, local_group(), phase).tokens.tolist()
    return tokens


class MemoryLoadGroup:
    """Ranks inside one event loop; all of them are given this one object."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._round = _Round()

    async def sum(self, counts: Tensor) -> Tensor:
        """Wait for the other ranks, then add up."""
        current = self._round
        current.counts.append(counts.cpu().clone())
        if len(current.counts) == self.num_ranks:
            self._round = _Round()
            current.complete.set()
        await current.complete.wait()
        return torch.stack(current.counts).sum(dim=0)


class _Round:
    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.complete = anyio.Event()
