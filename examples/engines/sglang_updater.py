"""SGLang's expert location updater, with the weights moved by async_eplb: its call and metadata keep their shapes.

The engine calls ``update(routed_experts_weights_of_layer, new_expert_location_metadata, update_layer_ids, nnodes,
rank)``. Here the weights are given once, because their addresses never change, and so is the metadata that the router
reads: layers are published into its own tensors. The rest of the call stays. Dense layers have rows in the maps but no
experts, so the layers to update are named. Run it as a program: four processes on two nodes, three updates, every byte
compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from async_eplb import (
    EPTopology,
    ExpertMap,
    ExpertPlacement,
    ExpertWeights,
    LayerCommit,
    MapTables,
    SyncUpdater,
    TorchDistTransport,
)
from async_eplb.errors import RankMismatch
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import random_placement

NUM_RANKS, NUM_NODES, NUM_SLOTS = 4, 2, 3
NUM_LAYERS, NUM_DENSE_LAYERS, NUM_EXPERTS = 6, 2, 8


@dataclass
class ExpertLocationMetadata:
    """Stand-in for the engine's own: what its router reads.

    - ``physical_to_logical_map`` ``[layers, physical]``, dense layers included, and the same on the CPU
    - ``logical_to_all_physical_map`` ``[layers, logical, X]``, padded with -1
    - ``logical_to_all_physical_map_num_valid`` ``[layers, logical]``
    - ``logical_to_rank_dispatch_physical_map`` ``[layers, logical]``, of this rank
    """

    physical_to_logical_map: Tensor
    physical_to_logical_map_cpu: Tensor
    logical_to_all_physical_map: Tensor
    logical_to_all_physical_map_num_valid: Tensor
    logical_to_rank_dispatch_physical_map: Tensor

    @classmethod
    def of(cls, published: ExpertMap) -> "ExpertLocationMetadata":
        """Take published tables under the engine's names."""
        return cls(
            published.physical_to_logical_map,
            published.physical_to_logical_map.to("cpu", copy=True),
            published.logical_to_all_physical_map,
            published.logical_replica_count,
            published.logical_to_dispatch_physical_map,
        )

    @property
    def tables(self) -> MapTables:
        """What the router reads, whose rows change in place as layers land."""
        return MapTables(
            physical_to_logical_map=self.physical_to_logical_map,
            logical_to_all_physical_map=self.logical_to_all_physical_map,
            logical_replica_count=self.logical_to_all_physical_map_num_valid,
            logical_to_dispatch_physical_map=self.logical_to_rank_dispatch_physical_map,
        )

    @property
    def num_logical_experts(self) -> int:
        """Experts of the model."""
        return self.logical_to_all_physical_map.shape[1]


class ExpertLocationUpdater:
    """Stands where the engine's updater of this name stood. A context manager, entered by all ranks together.

    :param metadata: the placement that the weights have, and what the router reads: its rows change in place
    """

    def __init__(
        self,
        routed_experts_weights_of_layer: Mapping[int, Sequence[Tensor]],
        metadata: ExpertLocationMetadata,
        nnodes: int,
        rank: int,
    ) -> None:
        placement = _placement(metadata)
        transport = TorchDistTransport()  # the engine's EP group; here, the world
        topology = EPTopology.for_physical_experts(
            placement.num_physical_experts, num_ranks=transport.num_ranks, num_nodes=nnodes
        )
        weights = ExpertWeights(routed_experts_weights_of_layer)
        self.metadata = metadata
        self._updater = SyncUpdater(
            weights,
            placement,
            topology,
            rank=rank,
            transport=transport,
            tables=metadata.tables,
            on_commit=self._note_commit,
        )

    def __enter__(self) -> Self:
        self._updater.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._updater.__exit__(kind, error, traceback)

    def update(
        self,
        new_expert_location_metadata: ExpertLocationMetadata,
        update_layer_ids: Sequence[int],
        nnodes: int,
        rank: int,
    ) -> None:
        """Move the weights of these layers and overwrite their rows of :attr:`metadata`.

        :raises RankMismatch: if ranks were added or removed: that needs a new group, and so a new updater
        :raises EplbError: as ``ExpertUpdater.update`` does
        """
        new = _placement(new_expert_location_metadata)
        topology = self._updater.topology
        ranks = new.num_physical_experts / topology.num_local_physical_experts
        for what, expected, actual in (
            ("ranks", topology.num_ranks, ranks),
            ("nodes", topology.num_nodes, nnodes),
            ("rank", self._updater.rank, rank),
        ):
            if expected != actual:
                raise RankMismatch(
                    f"the updater was made for {what} {expected}, the new metadata is for {what} {actual:g}; make a "
                    "new group and a new updater",
                    expected=expected,
                    actual=actual,
                )
        self._updater.update(new, layers=update_layer_ids)

    def _note_commit(self, commit: LayerCommit) -> None:
        self.metadata.physical_to_logical_map_cpu[commit.layer] = commit.maps.physical_to_logical_map


def _placement(metadata: ExpertLocationMetadata) -> ExpertPlacement:
    return ExpertPlacement.from_mapping(metadata.physical_to_logical_map, metadata.num_logical_experts)


def metadata_of(placement: ExpertPlacement, topology: EPTopology, rank: int) -> ExpertLocationMetadata:
    """Return what the engine computes from a placement before it calls its updater."""
    return ExpertLocationMetadata.of(ExpertMap(placement, topology, rank=rank))


def expert_tensors(layer: int, expert: int) -> list[Tensor]:
    """Return an expert as a block-quantised checkpoint has it: fp8 weights and their scales."""
    generator = torch.Generator().manual_seed(layer * 1000 + expert)
    shapes = {
        (32, 16): torch.float8_e4m3fn,
        (16, 32): torch.float8_e4m3fn,
        (2, 1): torch.float32,
        (1, 2): torch.float32,
    }
    return [torch.rand(shape, generator=generator).to(dtype) for shape, dtype in shapes.items()]


def rank_main(world: WorldRank) -> int:
    """Be one rank of the engine; return how many slots were compared."""
    topology = EPTopology(world.num_ranks, NUM_NODES, NUM_SLOTS)
    rng = np.random.default_rng(0)
    moe_layers = range(NUM_DENSE_LAYERS, NUM_LAYERS)
    placements = [random_placement(rng, NUM_LAYERS, topology.num_physical_experts, NUM_EXPERTS) for _ in range(4)]
    held = placements[0].physical_to_logical_map[:, topology.slots_of(world.rank)].tolist()
    weights = {
        layer: [torch.stack(slots) for slots in zip(*(expert_tensors(layer, e) for e in held[layer]), strict=True)]
        for layer in moe_layers
    }
    before = metadata_of(placements[0], topology, world.rank)
    compared = 0
    with ExpertLocationUpdater(weights, before, NUM_NODES, world.rank) as updater:
        for placement in placements[1:]:
            new = metadata_of(placement, topology, world.rank)
            for chunk in (list(moe_layers)[:2], list(moe_layers)[2:]):  # the engine updates in chunks of layers
                updater.update(new, chunk, NUM_NODES, world.rank)
            compared += compare(weights, updater.metadata, topology.slots_of(world.rank))
        refuse_another_rank(updater, topology)
    return compared


def compare(weights: Mapping[int, Sequence[Tensor]], metadata: ExpertLocationMetadata, local: slice) -> int:
    """Check that each slot holds what the router's map says of it; return the number of slots."""
    assert torch.equal(metadata.physical_to_logical_map_cpu, metadata.physical_to_logical_map)
    for layer, tensors in weights.items():
        for slot, expert in enumerate(metadata.physical_to_logical_map[layer, local].tolist()):
            for tensor, content in zip(tensors, expert_tensors(layer, expert), strict=True):
                assert torch.equal(tensor[slot].view(torch.uint8), content.view(torch.uint8)), (layer, slot)
    return len(weights) * NUM_SLOTS


def refuse_another_rank(updater: ExpertLocationUpdater, topology: EPTopology) -> None:
    """Show that a metadata for one more rank is refused before a byte moves."""
    larger = EPTopology(topology.num_ranks + 1, 1, NUM_SLOTS)
    grown = ExpertPlacement.trivial(NUM_LAYERS, larger.num_physical_experts, NUM_EXPERTS)
    try:
        updater.update(metadata_of(grown, larger, 0), [NUM_DENSE_LAYERS], NUM_NODES, dist.get_rank())
    except RankMismatch as error:
        if dist.get_rank() == 0:
            print(f"refused, {type(error).__name__}: {error}")


if __name__ == "__main__":
    slots = sum(run_world(rank_main, NUM_RANKS))
    print(f"SGLang's shapes: {slots} slots compared over 3 updates, all right")
