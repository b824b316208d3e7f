"""Sums of loads over ranks that share one event loop, what a window has counted, and what that takes."""

from typing import Any

import anyio
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from async_eplb.device import DeviceEvent
from async_eplb.load.group import LocalLoadGroup
from async_eplb.load.window import LoadWindow
from async_eplb.testing.workers import ScheduledWorkers


def local_group() -> LocalLoadGroup:
    """Return the group of a rank alone, without threads."""
    return LocalLoadGroup(ScheduledWorkers())


def counted(window: LoadWindow, phase: str | None = None) -> list[list[int]]:
    """Return what one rank has counted over the window: ``[layers, logical]``."""
    tokens: list[list[int]] = anyio.run(window.gather, local_group(), phase).tokens.tolist()
    return tokens


class OpNames(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of operations that tensors are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.number = 0

    @property
    def waiting(self) -> set[str]:
        """Those for which the host waits for the device."""
        names = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")
        return {f"aten::{name}" for name in names} & self.names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        by_mask = name == "aten::index" and any(index.dtype == torch.bool for index in args[1])
        self.names.add("aten::nonzero" if by_mask else name)
        self.number += 1
        return func(*args, **(kwargs or {}))


class MemoryLoadGroup:
    """Ranks inside one event loop; all of them are given this one object."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._round = _Round()

    async def sum(self, counts: Tensor, after: DeviceEvent | None = None) -> Tensor:
        """Wait for the other ranks, then add up."""
        assert after is None or after.query()
        current = self._round
        current.counts.append(counts.clone())
        if len(current.counts) == self.num_ranks:
            self._round = _Round()
            current.complete.set()
        await current.complete.wait()
        return torch.stack(current.counts).sum(dim=0)


class _Round:
    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.complete = anyio.Event()
