"""The published routing view: what the model's router reads, at addresses that never change."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import TooManyReplicas
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True, eq=False)
class LayerMaps:
    """One layer's maps, int64: ready to be published on the host, pinned where the device is a GPU; or published."""

    physical_to_logical: Tensor
    logical_to_all_physical: Tensor
    logical_replica_count: Tensor
    logical_to_dispatch_physical: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return (
            self.physical_to_logical,
            self.logical_to_all_physical,
            self.logical_replica_count,
            self.logical_to_dispatch_physical,
        )


class ExpertMap:
    """Routing tables of all layers, on the device of the weights. Rows are replaced in place, in stream order.

    - ``physical_to_logical_map`` int64 ``[layers, physical]``
    - ``logical_to_all_physical_map`` int64 ``[layers, logical, max_replicas]``, padded with -1
    - ``logical_replica_count`` int64 ``[layers, logical]``
    - ``logical_to_dispatch_physical_map`` int64 ``[layers, logical]``: where this rank sends an expert's tokens
      if it does not choose among the replicas itself
    - ``layer_generation`` int64 ``[layers]``: how often the layer has been replaced

    :param max_replicas: fixed width of ``logical_to_all_physical_map``; without it, what the slots can hold at
        most when every expert has a replica
    :param seed: of the dispatch map's even spread
    :raises TooManyReplicas: if the placement has an expert with more
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        topology: EPTopology,
        *,
        rank: int,
        device: torch.device | str = "cpu",
        max_replicas: int | None = None,
        seed: int = 0,
    ) -> None:
        logical = placement.num_logical_experts
        layers = placement.num_layers
        self._topology = topology
        self._rank = rank
        self._seed = seed
        self.max_replicas = max_replicas or max(1, placement.num_physical_experts - logical + 1)

        def table(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.physical_to_logical_map = table(layers, placement.num_physical_experts)
        self.logical_to_all_physical_map = table(layers, logical, self.max_replicas)
        self.logical_replica_count = table(layers, logical)
        self.logical_to_dispatch_physical_map = table(layers, logical)
        self.layer_generation = table(layers)
        self.require_room(placement)
        for layer in range(layers):
            self.publish(layer, self.layer_maps(placement, layer))
        self.layer_generation.zero_()

    def require_room(self, placement: ExpertPlacement) -> None:
        """Check that no expert of a placement has more replicas than the published map is wide.

        :raises TooManyReplicas: if one has
        """
        counts = placement.replica_counts()
        if counts.size and counts.max() > self.max_replicas:
            layer, expert = (int(i) for i in np.argwhere(counts > self.max_replicas)[0])
            raise TooManyReplicas(
                f"layer {layer}: logical expert {expert} has {counts[layer, expert]} replicas, but the published map "
                f"has room for {self.max_replicas}; raise UpdateOptions.max_replicas",
                layer=layer,
                logical_expert=expert,
                replicas=int(counts[layer, expert]),
                limit=self.max_replicas,
            )

    def layer_maps(self, placement: ExpertPlacement, layer: int) -> LayerMaps:
        """Compute what :meth:`publish` writes for one layer of a placement."""
        row = placement.physical_to_logical_map[layer]
        replicas = logical_to_all_physical(row, placement.num_logical_experts, self.max_replicas)
        counts = (replicas != EMPTY_SLOT).sum(axis=1)
        taken = replicas[:, : max(1, counts.max(initial=0))]
        dispatch = dispatch_map(taken, self._topology, self._rank, seed=self._seed + layer)
        values = (row, replicas, counts, dispatch)
        together = torch.from_numpy(np.concatenate([each.ravel() for each in values], dtype=np.int64))
        if self.physical_to_logical_map.is_cuda:
            together = together.pin_memory()
        parts = torch.split(together, [each.size for each in values])
        return LayerMaps(*(part.view(each.shape) for part, each in zip(parts, values, strict=True)))

    def publish(self, layer: int, maps: LayerMaps) -> None:
        """Replace one layer's rows in place, on the current stream, and raise its generation."""
        for published, new in zip(self.published(layer).tensors, maps.tensors, strict=True):
            published.copy_(new, non_blocking=True)
        self.layer_generation[layer] += 1

    def published(self, layer: int) -> LayerMaps:
        """Return one layer's rows in place."""
        return LayerMaps(
            self.physical_to_logical_map[layer],
            self.logical_to_all_physical_map[layer],
            self.logical_replica_count[layer],
            self.logical_to_dispatch_physical_map[layer],
        )


def logical_to_all_physical(
    row: npt.NDArray[np.integer], num_logical_experts: int, width: int
) -> npt.NDArray[np.int64]:
    """Invert one layer's map: the physical experts of each logical one, ascending, int64 ``[logical, width]``.

    :param row: ``[physical]``, -1 where empty
    """
    replicas = np.full((num_logical_experts, width), EMPTY_SLOT, dtype=np.int64)
    physical = np.flatnonzero(row != EMPTY_SLOT)
    order = physical[np.argsort(row[physical], kind="stable")]
    logical = row[order]
    starts = np.searchsorted(logical, np.arange(num_logical_experts))
    replicas[logical, np.arange(len(order)) - starts[logical]] = order
    return replicas


def dispatch_map(
    replicas: npt.NDArray[np.int64], topology: EPTopology, rank: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """Choose, for each logical expert, the one replica that ``rank`` sends its tokens to: int64 ``[logical]``.

    The only replica; else the lowest on this rank; else, if replicas are on several nodes, the lowest on this
    node; else the ranks that are left take the replicas in turn, beginning anywhere, drawn from ``seed``. -1 without
    a replica.

    :param replicas: as :func:`logical_to_all_physical` returns
    """
    held = replicas != EMPTY_SLOT
    owner = replicas // topology.num_local_physical_experts
    node = owner // topology.num_ranks_per_node
    several_nodes = (held & (node != node[:, :1])).any(axis=1)
    here = held & (owner == rank)
    near = held & (node == topology.node_of(rank)) & several_nodes[:, None]
    preferred = np.where(here.any(axis=1, keepdims=True), here, near)
    chosen = np.where(
        preferred.any(axis=1), replicas[np.arange(len(replicas)), preferred.argmax(axis=1)], replicas[:, 0]
    )
    counts = held.sum(axis=1)
    spread = np.flatnonzero(~preferred.any(axis=1) & (counts > 1))
    if not len(spread):
        return chosen
    draws = np.random.default_rng(seed).integers(0, 2**31, (2, len(replicas)))[:, spread]  # the same on every rank
    far = _without_preference(owner[spread], node[spread], held[spread], several_nodes[spread], topology)
    turn = (far[:, :rank].sum(axis=1) + draws[0]) % far.sum(axis=1)
    chosen[spread] = replicas[spread, (turn + draws[1]) % counts[spread]]
    return chosen


def _without_preference(
    owner: npt.NDArray[np.int64],
    node: npt.NDArray[np.int64],
    held: npt.NDArray[np.bool_],
    several_nodes: npt.NDArray[np.bool_],
    topology: EPTopology,
) -> npt.NDArray[np.bool_]:
    """Return which ranks have neither a replica of their own nor a nearer node to prefer: ``[experts, ranks]``."""
    expert, replica = np.nonzero(held)
    on_rank = np.zeros((len(owner), topology.num_ranks), dtype=np.bool_)
    on_rank[expert, owner[expert, replica]] = True
    on_node = np.zeros((len(owner), topology.num_nodes), dtype=np.bool_)
    on_node[expert, node[expert, replica]] = True
    on_node &= several_nodes[:, None]
    return ~(on_rank | np.repeat(on_node, topology.num_ranks_per_node, axis=1))
