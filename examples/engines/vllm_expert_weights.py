"""vLLM's expert weights, moved by async_eplb: one iterable of flattened tensors a MoE layer, and old and new indices.

The engine calls ``rearrange_expert_weights_inplace(old_global_expert_indices, new_global_expert_indices,
expert_weights, ep_group, is_profile, rank_mapping)``; only MoE layers have rows. Here the weights, the first indices
and the group are given once, because addresses never change, and the rest of the call stays. Beside it stands the same
without blocking: ``begin`` returns at once, and the engine calls ``step`` before each forward pass, as it calls
``EplbState.step``. Run it as a program: four processes, of which three are the EP group, three updates, the last one
while forward passes go on, every byte compared.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import EPTopology, ExpertPlacement, ExpertWeights, SyncUpdater, TorchDistTransport
from async_eplb.errors import InvalidPlacement, RankMismatch
from async_eplb.sync import SyncUpdateHandle
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import random_placement

EP_RANKS, NUM_SLOTS, NUM_LAYERS, NUM_EXPERTS = [0, 1, 3], 4, 3, 9


class ExpertRearranger:
    """Stands where the engine's function stood. A context manager, entered by all ranks of the group together.

    :param expert_weights: ``model.expert_weights``: for each MoE layer its tensors, ``[local physical, values]``
    :param global_expert_indices: logical expert of each physical one, ``[MoE layers, physical]``
    :param ep_group: need not be the world
    """

    def __init__(
        self, expert_weights: Sequence[Iterable[Tensor]], global_expert_indices: Tensor, ep_group: ProcessGroup
    ) -> None:
        weights = ExpertWeights({layer: list(tensors) for layer, tensors in enumerate(expert_weights)})
        placement = ExpertPlacement.from_mapping(global_expert_indices)
        self._num_logical_experts = placement.num_logical_experts
        transport = TorchDistTransport(ep_group)
        topology = EPTopology(transport.num_ranks, 1, weights.num_local_physical_experts)
        self._updater = SyncUpdater(weights, placement, topology, rank=transport.rank, transport=transport)

    def __enter__(self) -> Self:
        self._updater.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._updater.__exit__(kind, error, traceback)

    @property
    def layer_state(self) -> tuple[Tensor, Tensor]:
        """What the engine gives each layer's router, replaced in place as layers land.

        ``logical_to_physical_map`` ``[MoE layers, logical, replicas]`` and ``logical_replica_count`` ``[MoE layers,
        logical]``.
        """
        published = self._updater.expert_map
        return published.logical_to_all_physical_map, published.logical_replica_count

    def rearrange_expert_weights_inplace(
        self,
        old_global_expert_indices: Tensor,
        new_global_expert_indices: Tensor,
        *,
        is_profile: bool = False,
        rank_mapping: Mapping[int, int] | None = None,
    ) -> None:
        """Move the weights to new indices.

        :param is_profile: the engine's memory profiling: nothing moves
        :param rank_mapping: the engine's change of the number of ranks, old rank to new one
        :raises RankMismatch: if ranks are added or removed: that needs a new group, and so a new rearranger
        :raises EplbError: as ``ExpertUpdater.update`` does
        """
        new = self._checked(old_global_expert_indices, new_global_expert_indices, rank_mapping)
        if not is_profile:
            self._updater.update(new)

    def begin(self, old_global_expert_indices: Tensor, new_global_expert_indices: Tensor) -> SyncUpdateHandle:
        """Begin to move the weights, and go on with forward passes.

        :raises EplbError: as :meth:`rearrange_expert_weights_inplace`, for what is refused
        """
        return self._updater.begin(self._checked(old_global_expert_indices, new_global_expert_indices))

    def step(self) -> None:
        """Stand before a forward pass, dummy ones included: layers that all ranks have staged are new from here on."""
        self._updater.step()

    def _checked(self, old: Tensor, new: Tensor, rank_mapping: Mapping[int, int] | None = None) -> ExpertPlacement:
        topology = self._updater.topology
        ranks = new.shape[1] / topology.num_local_physical_experts
        if rank_mapping is not None:
            ranks = len([rank for rank in rank_mapping.values() if rank >= 0])
        if ranks != topology.num_ranks:
            raise RankMismatch(
                f"the EP group has {topology.num_ranks} ranks, the new indices are for {ranks:g}; make a new group "
                "and a new rearranger",
                expected=topology.num_ranks,
                actual=ranks,
            )
        if self._placement(old) != self._updater.placement:
            raise InvalidPlacement("the old indices are not those that the weights have")
        return self._placement(new)

    def _placement(self, indices: Tensor) -> ExpertPlacement:
        return ExpertPlacement.from_mapping(indices, self._num_logical_experts)


def expert_tensors(layer: int, expert: int) -> list[Tensor]:
    """Return an expert's tensors: ``w13``, ``w2``, and the scale of ``w13``."""
    generator = torch.Generator().manual_seed(layer * 1000 + expert)
    w13, w2, scale = (torch.rand(shape, generator=generator) for shape in ((32, 16), (16, 32), (32, 16)))
    return [w13.bfloat16(), w2.bfloat16(), scale]


def expert_weights(layer: int, experts: Sequence[int]) -> list[Tensor]:
    """Return what ``FusedMoE.get_expert_weights`` does: contiguous views ``[local physical, values]``.

    A layer may keep its scale transposed; it is turned back here, which is another view of the same memory.
    """
    slots = zip(*(expert_tensors(layer, expert) for expert in experts), strict=True)
    w13, w2, scale = (torch.stack(tensors) for tensors in slots)
    kept_scale = scale.mT
    return [tensor.view(len(experts), -1) for tensor in (w13, w2, kept_scale.mT)]


def rank_main(world: WorldRank) -> int:
    """Be one rank of the engine; return how many slots were compared."""
    ep_group = dist.new_group(EP_RANKS)
    if world.rank not in EP_RANKS:
        return 0
    topology = EPTopology(len(EP_RANKS), 1, NUM_SLOTS)
    rng = np.random.default_rng(0)
    indices = [
        torch.tensor(random_placement(rng, NUM_LAYERS, 12, NUM_EXPERTS).physical_to_logical_map, dtype=torch.int64)
        for _ in range(4)
    ]
    local = topology.slots_of(dist.get_rank(ep_group))
    weights = [expert_weights(layer, row.tolist()) for layer, row in enumerate(indices[0][:, local])]
    compared = 0
    with ExpertRearranger(weights, indices[0], ep_group) as rearranger:
        for old, new in itertools.pairwise(indices[:-1]):
            rearranger.rearrange_expert_weights_inplace(old, new)
            compared += compare(weights, new[:, local])
        rearrange_while_serving(rearranger, indices[-2], indices[-1], ep_group)
        compared += compare(weights, indices[-1][:, local])
        replicas, counts = rearranger.layer_state
        assert torch.equal((replicas >= 0).sum(2), counts)
        refuse_another_rank(rearranger, indices[-1])
    return compared


def rearrange_while_serving(rearranger: ExpertRearranger, old: Tensor, new: Tensor, group: ProcessGroup) -> None:
    """Make forward passes until all ranks see that the weights have moved; in each, ranks wait for each other."""
    handle = rearranger.begin(old, new)
    everywhere = torch.zeros(1)
    while not everywhere:
        rearranger.step()
        everywhere.fill_(handle.done)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=group)
    handle.wait()


def compare(weights: Sequence[Sequence[Tensor]], local_indices: Tensor) -> int:
    """Check that each slot holds the expert that the indices name; return the number of slots."""
    for layer, tensors in enumerate(weights):
        for tensor, expected in zip(tensors, expert_weights(layer, local_indices[layer].tolist()), strict=True):
            assert torch.equal(tensor, expected), layer
    return local_indices.numel()


def refuse_another_rank(rearranger: ExpertRearranger, indices: Tensor) -> None:
    """Show that a rank that leaves is refused before a byte moves."""
    try:
        rearranger.rearrange_expert_weights_inplace(indices, indices[:, :8], rank_mapping={0: 0, 1: 1, 2: -1})
    except RankMismatch as error:
        if dist.get_rank() == 0:
            print(f"refused, {type(error).__name__}: {error}")


if __name__ == "__main__":
    slots = sum(run_world(rank_main, 4))
    print(f"vLLM's shapes: {slots} slots compared over 3 updates, all right")
