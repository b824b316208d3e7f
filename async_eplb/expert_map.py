"""Published routing tables, which the model's router reads at addresses that never change."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import TooManyReplicas
from async_eplb.modes import outside_modes
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True, eq=False)
class LayerMaps:
    """The maps of one layer, int64: on the host, ready to be published (pinned for a GPU), or views of published ones.

    :param physical_to_logical: ``[physical]``
    :param logical_to_all_physical: ``[logical, max_replicas]``
    :param logical_replica_count: ``[logical]``
    :param logical_to_dispatch_physical: ``[logical]``
    """

    physical_to_logical: Tensor
    logical_to_all_physical: Tensor
    logical_replica_count: Tensor
    logical_to_dispatch_physical: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All four maps, in the order of the fields."""
        return (
            self.physical_to_logical,
            self.logical_to_all_physical,
            self.logical_replica_count,
            self.logical_to_dispatch_physical,
        )


class ExpertMap:
    """Routing tables of all layers, on the device of the weights. Rows are replaced in place, in stream order.

    The constructor allocates all tables and publishes the placement, on the current stream of the device, so that
    their addresses are final when the model captures CUDA graphs.

    - ``physical_to_logical_map`` int64 ``[layers, physical]``
    - ``logical_to_all_physical_map`` int64 ``[layers, logical, max_replicas]``, ascending, padded with -1
    - ``logical_replica_count`` int64 ``[layers, logical]``
    - ``logical_to_dispatch_physical_map`` int64 ``[layers, logical]``: where this rank sends an expert's tokens
      if it does not choose among the replicas itself
    - ``layer_generation`` int64 ``[layers]``: how often the layer has been replaced

    :param max_replicas: fixed width of ``logical_to_all_physical_map``; without it, what the slots can hold at
        most when every expert has a replica
    :param seed: of the random choices in the dispatch map; equal on all ranks, or ranks spread tokens unevenly
    :raises TooManyReplicas: if an expert of the placement has more than ``max_replicas``
    """

    @outside_modes()
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

        # Rule 7: these are all the tables there will ever be; rows are replaced in place.
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
        """Check that no expert of a placement has more than ``max_replicas`` replicas.

        :raises TooManyReplicas: if one has
        """
        counts = placement.replica_counts()  # [layers, logical]
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
        """Compute one layer's maps of a placement, on the host, for :meth:`publish`."""
        row = placement.physical_to_logical_map[layer]  # [physical]
        replicas = logical_to_all_physical(row, placement.num_logical_experts, self.max_replicas)
        counts = (replicas != EMPTY_SLOT).sum(axis=1)  # [logical]
        unpadded = replicas[:, : max(1, counts.max(initial=0))]  # [logical, most replicas in this layer]
        dispatch = dispatch_map(unpadded, self._topology, self._rank, seed=self._seed + layer)  # [logical]
        values = (row, replicas, counts, dispatch)
        # One block of memory, so that it is pinned once. It is not used again before the device has read it (rule 14):
        # torch's allocator of pinned memory sees to that.
        together = torch.from_numpy(np.concatenate([each.ravel() for each in values], dtype=np.int64))
        if self.physical_to_logical_map.is_cuda:
            together = together.pin_memory()
        parts = torch.split(together, [each.size for each in values])
        return LayerMaps(*(part.view(each.shape) for part, each in zip(parts, values, strict=True)))

    def publish(self, layer: int, maps: LayerMaps) -> None:
        """Replace one layer's rows in place and raise its generation, on the current stream."""
        for published, new in zip(self.published(layer).tensors, maps.tensors, strict=True):
            published.copy_(new, non_blocking=True)
        self.layer_generation[layer] += 1

    def published(self, layer: int) -> LayerMaps:
        """Return views of one layer's rows."""
        return LayerMaps(
            self.physical_to_logical_map[layer],
            self.logical_to_all_physical_map[layer],
            self.logical_replica_count[layer],
            self.logical_to_dispatch_physical_map[layer],
        )


def logical_to_all_physical(
    row: npt.NDArray[np.integer], num_logical_experts: int, width: int
) -> npt.NDArray[np.int64]:
    """Invert one layer's map: return the physical experts of each logical one, int64 ``[logical, width]``.

    They are ascending, and padded with -1.

    :param row: ``[physical]``, -1 where empty
    :param width: at least the replicas of each expert
    """
    replicas = np.full((num_logical_experts, width), EMPTY_SLOT, dtype=np.int64)
    held = np.flatnonzero(row != EMPTY_SLOT)  # [held]: physical experts that hold one
    physical = held[np.argsort(row[held], kind="stable")]  # [held]: by logical expert, then ascending
    logical = row[physical]  # [held]
    starts = np.searchsorted(logical, np.arange(num_logical_experts))  # [logical]: where an expert's replicas begin
    number = np.arange(len(physical)) - starts[logical]  # [held]: of the replica among its expert's
    replicas[logical, number] = physical
    return replicas


def dispatch_map(
    replicas: npt.NDArray[np.int64], topology: EPTopology, rank: int, *, seed: int
) -> npt.NDArray[np.int64]:
    """Choose, for each logical expert, the one replica that ``rank`` sends its tokens to: int64 ``[logical]``.

    The only replica; else the lowest on this rank; else, if replicas are on several nodes, the lowest on this
    node. Ranks for which none of these exists take the replicas in turn, beginning at a random rank and replica. -1
    for an expert without a replica.

    :param replicas: ``[logical, width]``, as :func:`logical_to_all_physical` returns
    :param seed: of the random beginnings, the same on every rank
    """
    held = replicas != EMPTY_SLOT  # [logical, width]; False where padded
    owner = replicas // topology.num_local_physical_experts  # [logical, width]: the rank of each replica
    node = owner // topology.num_ranks_per_node  # [logical, width]
    several_nodes = (held & (node != node[:, :1])).any(axis=1)  # [logical]
    here = held & (owner == rank)  # [logical, width]
    near = held & (node == topology.node_of(rank)) & several_nodes[:, None]  # [logical, width]
    preferred = np.where(here.any(axis=1, keepdims=True), here, near)  # [logical, width]
    has_preference = preferred.any(axis=1)  # [logical]
    lowest_preferred = replicas[np.arange(len(replicas)), preferred.argmax(axis=1)]  # [logical]
    chosen = np.where(has_preference, lowest_preferred, replicas[:, 0])  # [logical]
    counts = held.sum(axis=1)  # [logical]
    spread = np.flatnonzero(~has_preference & (counts > 1))  # [spread]: experts whose replicas are taken in turn
    if not len(spread):
        return chosen
    # Drawn for all experts, so that every rank draws the same for each.
    first_turn, first_replica = np.random.default_rng(seed).integers(0, 2**31, (2, len(replicas)))[:, spread]
    takers = _without_preference(owner[spread], node[spread], held[spread], several_nodes[spread], topology)
    turn = (takers[:, :rank].sum(axis=1) + first_turn) % takers.sum(axis=1)  # [spread]: of this rank among the takers
    chosen[spread] = replicas[spread, (turn + first_replica) % counts[spread]]
    return chosen


def _without_preference(
    owner: npt.NDArray[np.int64],
    node: npt.NDArray[np.int64],
    held: npt.NDArray[np.bool_],
    several_nodes: npt.NDArray[np.bool_],
    topology: EPTopology,
) -> npt.NDArray[np.bool_]:
    """Return for which ranks no replica is nearer than others: bool ``[experts, ranks]``.

    That is, ranks without a replica, on nodes without one, unless all replicas are on one node.

    :param owner: rank of each replica: ``[experts, width]``; so are ``node`` and ``held``
    :param several_nodes: whether an expert has replicas on several nodes: ``[experts]``
    """
    expert, replica = np.nonzero(held)  # [replicas] each
    on_rank = np.zeros((len(owner), topology.num_ranks), dtype=np.bool_)
    on_rank[expert, owner[expert, replica]] = True
    on_node = np.zeros((len(owner), topology.num_nodes), dtype=np.bool_)
    on_node[expert, node[expert, replica]] = True
    on_node &= several_nodes[:, None]
    return ~(on_rank | np.repeat(on_node, topology.num_ranks_per_node, axis=1))
