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
    """Counts logical experts since the last :meth:`take`, all phases together."""

    def __init__(self, num_layers: int, num_logical_experts: int) -> None:
        self._counts = torch.zeros(num_layers, num_logical_experts, dtype=torch.int64)

    def record(
        self, layer: int, experts: Tensor, *, phase: str, physical: bool = False, valid: Tensor | None = None
    ) -> None:
        """Count the experts of rows that are valid."""
        del phase, physical
        counted = (experts if valid is None else experts[valid]).flatten().cpu()
        self._counts[layer] += torch.bincount(counted, minlength=self._counts.shape[1])

    def advance(self) -> None:
        """Close the pass, which is nothing to do here."""

    def take(self) -> Tensor:
        """Return the counts, int64 ``[layers, logical]``, and begin anew."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts
