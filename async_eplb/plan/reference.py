"""Plan one layer for one rank, slot by slot: the readable reference. :mod:`.update` plans all layers at once.

Every rank computes its own plan from the same two maps; plans match across ranks without a message. The choice
of sources reproduces the expert location updater of SGLang (``expert_location_updater.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from async_eplb.arguments import Whole, take
from async_eplb.errors import InvalidOptions, InvalidPlacement, UnheldExpert
from async_eplb.placement import EMPTY_SLOT
from async_eplb.plan.layer_plan import FanOut, LayerPlan, LocalCopy, Recv, Send, SlotSource
from async_eplb.topology import EPTopology

PhysicalToLogical = Sequence[int] | npt.NDArray[np.integer]
"""One layer's row of ``physical_to_logical_map``: ``[physical]``."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer of one expert from one rank to another."""

    logical_expert: int
    src_rank: int
    dst_rank: int
    same_node: bool


def plan_layer(old: PhysicalToLogical, new: PhysicalToLogical, topology: EPTopology, rank: int) -> LayerPlan:
    """Plan one layer for one rank.

    :param old: logical expert of each physical expert now, ``[physical]``, -1 where empty
    :param new: the same after the update
    :raises InvalidPlacement: if a map does not have one entry for each slot of the topology
    :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
    :raises InvalidOptions: if there is no such rank
    """
    rank = take(rank, Whole(0, topology.num_ranks - 1), "rank", InvalidOptions)
    transfers = layer_transfers(old, new, topology)
    slots = topology.slots_of(rank)
    old_local, new_local = _row(old, topology)[slots], _row(new, topology)[slots]
    incoming = {t.logical_expert: t for t in transfers if t.dst_rank == rank}

    sources: list[SlotSource] = []
    local_copies: list[LocalCopy] = []
    recvs: list[Recv] = []
    fan_outs: list[FanOut] = []
    receiving: dict[int, int] = {}
    for slot, (before, after) in enumerate(zip(old_local, new_local, strict=True)):
        if after == EMPTY_SLOT:
            source = SlotSource.EMPTY
        elif before == after:
            source = SlotSource.UNCHANGED
        elif after in old_local:
            source = SlotSource.SAME_GPU
            local_copies.append(LocalCopy(old_local.index(after), slot))
        elif after in receiving:
            source = SlotSource.FREE_RIDER
            fan_outs.append(FanOut(receiving[after], slot))
        else:
            transfer = incoming[after]
            source = SlotSource.SAME_NODE if transfer.same_node else SlotSource.CROSS_NODE
            receiving[after] = slot
            recvs.append(Recv(after, transfer.src_rank, slot))
        sources.append(source)
    sends = (
        Send(t.logical_expert, t.dst_rank, old_local.index(t.logical_expert)) for t in transfers if t.src_rank == rank
    )
    return LayerPlan(tuple(sources), tuple(local_copies), tuple(recvs), tuple(sends), tuple(fan_outs))


def layer_transfers(old: PhysicalToLogical, new: PhysicalToLogical, topology: EPTopology) -> tuple[Transfer, ...]:
    """List the transfers of all ranks for one layer, in the order in which they are posted.

    Destinations are cut into contiguous chunks, one for each source rank: those on a node that holds the expert
    over that node's sources, the others over all sources.

    :raises InvalidPlacement: if a map does not have one entry for each slot of the topology
    :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
    """
    holders = _ranks_by_expert(_row(old, topology), topology)
    takers = _ranks_by_expert(_row(new, topology), topology)
    transfers: list[Transfer] = []
    for expert in sorted(takers):
        sources = holders.get(expert, [])
        if not sources:
            raise UnheldExpert(
                f"the new placement needs logical expert {expert}, which nobody holds under the old one",
                logical_expert=expert,
            )
        destinations = [rank for rank in takers[expert] if rank not in sources]
        source_nodes = {topology.node_of(rank) for rank in sources}
        for node in sorted(source_nodes):
            transfers += _chunked(
                expert,
                [rank for rank in sources if topology.node_of(rank) == node],
                [rank for rank in destinations if topology.node_of(rank) == node],
                same_node=True,
            )
        transfers += _chunked(
            expert,
            sources,
            [rank for rank in destinations if topology.node_of(rank) not in source_nodes],
            same_node=False,
        )
    return tuple(transfers)


def _row(maps: PhysicalToLogical, topology: EPTopology) -> list[int]:
    """Return a layer's map as a list, if it fits the topology."""
    row = [int(expert) for expert in maps]
    if len(row) != topology.num_physical_experts:
        raise InvalidPlacement(
            f"a layer's map has {len(row)} physical experts; the topology has {topology.num_physical_experts}"
        )
    return row


def _ranks_by_expert(row: list[int], topology: EPTopology) -> dict[int, list[int]]:
    """Return the ranks that hold each expert, ascending."""
    ranks: dict[int, list[int]] = {}
    for physical, expert in enumerate(row):
        if expert == EMPTY_SLOT:
            continue
        holders = ranks.setdefault(expert, [])
        rank = topology.rank_of(physical)
        if not holders or holders[-1] != rank:
            holders.append(rank)
    return ranks


def _chunked(expert: int, sources: list[int], destinations: list[int], *, same_node: bool) -> list[Transfer]:
    """Cut destinations into one chunk for each source; the first chunks are longer by one where it must be."""
    size, longer = divmod(len(destinations), len(sources))
    bounds = [i * size + min(i, longer) for i in range(len(sources) + 1)]
    return [
        Transfer(expert, source, destination, same_node)
        for source, (start, stop) in zip(sources, pairwise(bounds), strict=True)
        for destination in destinations[start:stop]
    ]
