"""Where the model says which experts it chose."""

from typing import Protocol

import torch
from torch import Tensor


class LoadRecorder(Protocol):
    """Counts tokens by expert; ``async_eplb.LoadWindow`` is one."""

    def record(
        self, layer: int, experts: Tensor, *, phase: str, physical: bool = False, valid: Tensor | None = None
    ) -> None:
        """Count the experts of one layer in this pass.

        :param experts: int64 ``[rows, top_k]``
        :param phase: ``"prefill"`` or ``"decode"``
        :param physical: whether these are physical experts
        :param valid: bool ``[rows]``: rows that count; all without it
        """
        ...

    def advance(self) -> None:
        """Close the pass."""
        ...


class CountedLoad:
    """Counts logical experts of this rank's last passes, all phases together.

    :param window_passes: passes that count
    """

    def __init__(self, num_layers: int, num_logical_experts: int, *, window_passes: int = 40) -> None:
        self._counts = torch.zeros(window_passes, num_layers, num_logical_experts, dtype=torch.int64)
        self._number = 0

    def record(
        self, layer: int, experts: Tensor, *, phase: str, physical: bool = False, valid: Tensor | None = None
    ) -> None:
        """Count the experts of rows that are valid."""
        del phase, physical
        counted = (experts if valid is None else experts[valid]).flatten().cpu()
        current = self._counts[self._number % len(self._counts), layer]
        current += torch.bincount(counted, minlength=len(current))

    def advance(self) -> None:
        """Close the pass; the oldest is forgotten."""
        self._number += 1
        self._counts[self._number % len(self._counts)] = 0

    def total(self) -> Tensor:
        """Return the counts of the window, int64 ``[layers, logical]``."""
        return self._counts.sum(0)
