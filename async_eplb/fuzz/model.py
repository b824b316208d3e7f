"""A model of very small experts, all of a rank's in one array, so that comparing all of them takes microseconds."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import InvalidWeightSource
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology

_SIZES = [8, 3]
"""Bytes of an expert's tensors; one is not a multiple of a word."""


class TinyModel:
    """Experts of two tensors with random bytes. It is also a source of weights for recoveries."""

    def __init__(self, seed: int, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        rng = np.random.default_rng(seed)
        # [layers, experts + 1, bytes]; the last expert stands for an empty slot, whose number is -1
        self._content = rng.integers(0, 256, (num_layers, num_experts + 1, sum(_SIZES)), dtype=np.uint8)

    def slots(self, experts: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """Return the bytes of slots with these experts: ``[layers, slots]`` → uint8 ``[layers, slots, bytes]``."""
        layers = np.arange(len(experts))[:, None]
        slots: npt.NDArray[np.uint8] = self._content[layers, experts]
        return slots

    def memory(self, placement: ExpertPlacement, topology: EPTopology, rank: int) -> npt.NDArray[np.uint8]:
        """Return the live weights of a rank: uint8 ``[layers, slots, bytes]``; bytes of empty slots mean nothing."""
        return self.slots(placement.physical_to_logical_map[:, topology.slots_of(rank)]).copy()

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert's tensors: uint8 ``[bytes]`` each.

        :raises InvalidWeightSource: if there is no such expert
        """
        if logical_expert == EMPTY_SLOT:
            raise InvalidWeightSource("an empty slot has no weights", layer=layer, logical_expert=logical_expert)
        return list(torch.split(torch.from_numpy(self._content[layer, logical_expert]), _SIZES))


def tensors_of(memory: npt.NDArray[np.uint8]) -> Mapping[int, list[Tensor]]:
    """Return a rank's live weights as tensors that share their memory: row → tensors ``[slots, bytes]``."""
    shared = torch.from_numpy(memory)
    return {layer: list(torch.split(shared[layer], _SIZES, dim=1)) for layer in range(len(memory))}
