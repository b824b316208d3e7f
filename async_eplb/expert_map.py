"""Published routing tables, which the model's router reads at addresses that never change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import InvalidTable, MissingTable, TooManyReplicas
from async_eplb.map_tables import WIDE, MapTables, published_part, require_tables
from async_eplb.modes import outside_modes
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True, eq=False)
class LayerMaps:
    """The maps of one layer, on the host: int64 tensors, named as the tables that they are rows of.

    :param physical_to_logical_map: ``[physical]``
    :param logical_to_all_physical_map: ``[logical, max_replicas]``
    :param logical_replica_count: ``[logical]``
    :param logical_to_dispatch_physical_map: ``[logical]``; None if there is no such table
    """

    physical_to_logical_map: Tensor
    logical_to_all_physical_map: Tensor
    logical_replica_count: Tensor
    logical_to_dispatch_physical_map: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerCommit:
    """A layer whose commit has just been enqueued, as ``on_commit`` gets it.

    What a recovery changes without a commit, because ranks are gone, is in ``Recovery.placement``.

    :param layer: row of the placement
    :param step: boundary that it was committed at; 0 in the exclusive mode and in a recovery
    :param maps: its new rows, on the host; they are the callee's to keep
    """

    layer: int
    step: int
    maps: LayerMaps


class ExpertMap:
    """Routing tables of all layers, on the device of the weights. Rows are replaced in place, in stream order.

    The constructor allocates all tables, or takes an engine's own, and publishes the placement, on the current stream
    of the device, so that their addresses are final when the model captures CUDA graphs.

    - ``physical_to_logical_map`` ``[layers, physical]``
    - ``logical_to_all_physical_map`` ``[layers, logical, max_replicas]``, ascending, padded with -1
    - ``logical_replica_count`` ``[layers, logical]``
    - ``logical_to_dispatch_physical_map`` ``[layers, logical]``: where this rank sends an expert's tokens
      if it does not choose among the replicas itself
    - ``layer_generation`` int64 ``[layers]``: how often the layer has been replaced

    :param max_replicas: how many replicas of an expert ``logical_to_all_physical_map`` has room for; without it, what
        the slots can hold at most when every expert has a replica, or what fits the engine's table
    :param seed: of the random choices in the dispatch map; equal on all ranks, or ranks spread tokens unevenly
    :param tables: an engine's tensors to publish into, and no others; without it, all tables are made, as int64
    :raises TooManyReplicas: if an expert of the placement has more than ``max_replicas``
    :raises InvalidTable: if a tensor cannot be published into; none has been written then
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
        tables: MapTables | None = None,
    ) -> None:
        logical, layers = placement.num_logical_experts, placement.num_layers
        self._topology = topology
        self._rank = rank
        self._seed = seed
        self.layer_generation = torch.zeros(layers, dtype=torch.int64, device=device)
        fitting = max(1, placement.num_physical_experts - logical + 1)
        shapes = {
            "physical_to_logical_map": (layers, placement.num_physical_experts),
            WIDE: (layers, logical, max_replicas or (fitting if tables is None else 1)),
            "logical_replica_count": (layers, logical),
            "logical_to_dispatch_physical_map": (layers, logical),
        }
        # Rule 7: these are all the tables there will ever be; rows are replaced in place.
        if not isinstance(tables, MapTables | None):
            raise InvalidTable(f"tables is of type {type(tables).__name__}; give MapTables", table="")
        self._tables = _made(shapes, self.layer_generation.device) if tables is None else tables.given()
        self.nbytes = self.layer_generation.nbytes + (
            sum(t.nbytes for t in self._tables.values()) if tables is None else 0
        )
        """Bytes of device memory that this takes; an engine's own tables are the engine's."""
        require_tables(self._tables, shapes, self.layer_generation.device)
        room = self._tables[WIDE].shape[-1] if WIDE in self._tables else fitting
        self.max_replicas = max_replicas or min(room, fitting)
        shapes[WIDE] = (layers, logical, self.max_replicas)
        self.require_room(placement)
        self._parts = {name: published_part(table, shapes[name]) for name, table in self._tables.items()}
        if WIDE in self._tables:
            published_part(self._tables[WIDE], (layers, logical, room)).fill_(EMPTY_SLOT)  # also where it is wider
        for layer in range(layers):
            self.publish(layer, self.staged(self.layer_maps(placement, layer)))
        self.layer_generation.zero_()

    @property
    def physical_to_logical_map(self) -> Tensor:
        """The logical expert of each physical one: ``[layers, physical]``."""
        return self._table("physical_to_logical_map")

    @property
    def logical_to_all_physical_map(self) -> Tensor:
        """All replicas of each expert, ascending, padded with -1: ``[layers, logical, max_replicas or more]``."""
        return self._table(WIDE)

    @property
    def logical_replica_count(self) -> Tensor:
        """How many replicas each expert has: ``[layers, logical]``."""
        return self._table("logical_replica_count")

    @property
    def logical_to_dispatch_physical_map(self) -> Tensor:
        """The replica that this rank sends an expert's tokens to: ``[layers, logical]``."""
        return self._table("logical_to_dispatch_physical_map")

    def require_room(self, placement: ExpertPlacement) -> None:
        """Check that no expert of a placement has more than ``max_replicas`` replicas.

        :raises TooManyReplicas: if one has
        """
        counts = placement.replica_counts()  # [layers, logical]
        if counts.size and counts.max() > self.max_replicas:
            layer, expert = (int(i) for i in np.argwhere(counts > self.max_replicas)[0])
            raise TooManyReplicas(
                f"layer {layer}: logical expert {expert} has {counts[layer, expert]} replicas, but the published map "
                f"has room for {self.max_replicas}; raise UpdateOptions.max_replicas, or give a wider table",
                layer=layer,
                logical_expert=expert,
                replicas=int(counts[layer, expert]),
                limit=self.max_replicas,
            )

    def layer_maps(self, placement: ExpertPlacement, layer: int) -> LayerMaps:
        """Compute one layer's maps of a placement, on the host."""
        row = placement.physical_to_logical_map[layer]  # [physical]
        replicas = logical_to_all_physical(row, placement.num_logical_experts, self.max_replicas)
        counts = (replicas != EMPTY_SLOT).sum(axis=1)  # [logical]
        dispatch = None
        if "logical_to_dispatch_physical_map" in self._tables:
            unpadded = replicas[:, : max(1, counts.max(initial=0))]  # [logical, most replicas in this layer]
            dispatch = _tensor(dispatch_map(unpadded, self._topology, self._rank, seed=self._seed + layer))
        return LayerMaps(_tensor(row), _tensor(replicas), _tensor(counts), dispatch)

    def rows(self, maps: LayerMaps) -> list[npt.NDArray[np.integer]]:
        """Return a layer's new rows of all tables that there are, each in the dtype of its table."""
        return [getattr(maps, name).to(part.dtype).numpy() for name, part in self._parts.items()]

    def staged(self, maps: LayerMaps) -> list[Tensor]:
        """Return what :meth:`rows` does as tensors to publish while nobody serves; committers upload rows before."""
        return [torch.from_numpy(row) for row in self.rows(maps)]

    def publish(self, layer: int, staged: Sequence[Tensor]) -> None:
        """Replace one layer's rows in place and raise its generation, on the current stream.

        :param staged: what :meth:`staged` returned for the layer's new maps, or the same on the device
        """
        for published, new in zip(self.published(layer), staged, strict=True):
            published.copy_(new, non_blocking=True)
        self.layer_generation[layer] += 1

    def published(self, layer: int) -> list[Tensor]:
        """Return one layer's rows, of all tables that there are, sharing their memory."""
        return [part[layer] for part in self._parts.values()]

    def _table(self, name: str) -> Tensor:
        if name not in self._tables:
            raise MissingTable(f"the map has no table {name}; name a tensor for it in MapTables", table=name)
        return self._tables[name]


def _made(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}


def _tensor(values: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


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
