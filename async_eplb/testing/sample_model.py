"""A sample model whose every byte is a function of (seed, layer, expert), and random placements for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology
from async_eplb.weights import ExpertWeights, Slots


@dataclass(frozen=True, slots=True)
class SampleModel:
    """Experts of several tensors of different dtypes, as in quantised checkpoints.

    :param seed: of all bytes
    :param hidden: width of the model
    :param intermediate: width of an expert
    """

    seed: int = 0
    hidden: int = 256
    intermediate: int = 128

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return name → dtype and shape of one expert's tensors; the last one is a scalar."""
        return {
            "w13": (torch.float8_e4m3fn, (2 * self.intermediate, self.hidden)),
            "w2": (torch.bfloat16, (self.hidden, self.intermediate)),
            "w2_zero_point": (torch.int8, (self.hidden,)),
            "w13_scale": (torch.float32, (2 * self.intermediate, 2)),
            "alpha": (torch.float32, ()),
        }

    def expert_nbytes(self) -> int:
        """Return the number of bytes of one expert."""
        return sum(self._sizes())

    def expert_bytes(self, layer: int, expert: int) -> list[Tensor]:
        """Return the content of an expert: uint8 ``[bytes]`` for each tensor."""
        rng = np.random.default_rng([self.seed, layer, expert])
        return [torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)) for size in self._sizes()]

    def _sizes(self) -> list[int]:
        """Return the number of bytes of each tensor of an expert."""
        return [dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors().values()]

    def weights(
        self, placement: ExpertPlacement, topology: EPTopology, rank: int, device: torch.device | str = "cpu"
    ) -> dict[int, list[Tensor]]:
        """Return the live weights of a rank: row → tensors ``[local physical, ...]``; empty slots hold zeros."""
        slots = topology.num_local_physical_experts
        rows = {
            layer: [torch.zeros((slots, *shape), dtype=dtype) for dtype, shape in self.tensors().values()]
            for layer in range(placement.num_layers)
        }
        weights = ExpertWeights(rows)
        for layer, slot, expert in self._held(placement, topology, rank):
            for view, content in zip(weights.slot_views(layer, slot), self.expert_bytes(layer, expert), strict=True):
                view.copy_(content)
        return {layer: [tensor.to(device) for tensor in tensors] for layer, tensors in rows.items()}

    def wrong_slots(
        self,
        tensors: Mapping[int, Sequence[Slots]],
        placement: ExpertPlacement,
        topology: EPTopology,
        rank: int,
    ) -> list[tuple[int, int]]:
        """Compare every byte of every slot that is not empty; return (layer, slot) of those that differ."""
        weights = ExpertWeights(tensors)
        wrong = []
        for layer, slot, expert in self._held(placement, topology, rank):
            contents = zip(weights.slot_elements(layer, slot), self.expert_bytes(layer, expert), strict=True)
            if not all(torch.equal(elements.reshape(-1).cpu(), content) for elements, content in contents):
                wrong.append((layer, slot))
        return wrong

    @staticmethod
    def _held(placement: ExpertPlacement, topology: EPTopology, rank: int) -> list[tuple[int, int, int]]:
        """Return (layer, slot, expert) of each slot of a rank that is not empty."""
        local = placement.physical_to_logical_map[:, topology.slots_of(rank)]  # [layers, slots]
        return [
            (layer, slot, expert)
            for layer, row in enumerate(local.tolist())
            for slot, expert in enumerate(row)
            if expert != EMPTY_SLOT
        ]


def random_placement(
    rng: np.random.Generator,
    num_layers: int,
    num_physical_experts: int,
    num_logical_experts: int,
    *,
    num_empty: int = 0,
) -> ExpertPlacement:
    """Draw a placement: in each layer, each expert once, random experts in the spare slots, all in random order.

    :param num_empty: slots of each layer that are empty
    """
    spare = num_physical_experts - num_logical_experts - num_empty
    rows = [
        rng.permutation(
            np.concatenate(
                [
                    np.arange(num_logical_experts),
                    rng.integers(0, num_logical_experts, spare),
                    np.full(num_empty, EMPTY_SLOT),
                ]
            )
        )
        for _ in range(num_layers)
    ]
    return ExpertPlacement.from_mapping(np.array(rows), num_logical_experts)
