"""Old and new placement of a layer → what one rank sends, receives and copies. Pure.

Every rank computes its own plan from the same two maps; plans match across ranks without a message. The choice
of sources reproduces the expert location updater of SGLang (``expert_location_updater.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from async_eplb.errors import InvalidPlacement, UnheldExpert
from async_eplb.placement import EMPTY_SLOT
from async_eplb.topology import EPTopology

PhysicalToLogical = Sequence[int] | npt.NDArray[np.integer]
"""One layer's row of ``physical_to_logical_map``: ``[physical]``."""


class SlotSource(Enum):
    """Where the new content of a slot comes from; the first that fits, in this order."""

    EMPTY = "empty"
    UNCHANGED = "unchanged"
    SAME_GPU = "same_gpu"
    FREE_RIDER = "free_rider"
    SAME_NODE = "same_node"
    CROSS_NODE = "cross_node"


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """Copy live slot ``src_slot`` into the staging of ``dst_slot``, on one rank."""

    src_slot: int
    dst_slot: int


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive an expert from ``src_rank`` into the staging of ``dst_slot``."""

    logical_expert: int
    src_rank: int
    dst_slot: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send the live slot ``src_slot`` to ``dst_rank``."""

    logical_expert: int
    dst_rank: int
    src_slot: int


@dataclass(frozen=True, slots=True)
class FanOut:
    """Commit the staging of ``staged_slot`` to ``dst_slot`` too."""

    staged_slot: int
    dst_slot: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expert that goes from one rank to another."""

    logical_expert: int
    src_rank: int
    dst_rank: int
    same_node: bool


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one rank does for one layer; the orders are part of the contract.

    :param slot_sources: one for each local slot
    :param local_copies: SAME_GPU slots, in slot order
    :param recvs: SAME_NODE and CROSS_NODE slots, in slot order
    :param sends: ascending expert, then same-node destinations, then cross-node ones, each in rank order
    :param fan_outs: FREE_RIDER slots, in slot order
    """

    slot_sources: tuple[SlotSource, ...]
    local_copies: tuple[LocalCopy, ...]
    recvs: tuple[Recv, ...]
    sends: tuple[Send, ...]
    fan_outs: tuple[FanOut, ...]

    @property
    def staged_slots(self) -> tuple[int, ...]:
        """The slots that pass through staging, in ascending order."""
        received = [recv.dst_slot for recv in self.recvs]
        return tuple(sorted(received + [copy.dst_slot for copy in self.local_copies]))


def plan_layer(old: PhysicalToLogical, new: PhysicalToLogical, topology: EPTopology, rank: int) -> LayerPlan:
    """Plan one layer for one rank.

    :param old: logical expert of each physical expert now, ``[physical]``, -1 where empty
    :param new: the same after the update
    :raises InvalidPlacement: if a map does not have one entry for each slot of the topology
    :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
    """
    return plan_rank(old, new, topology, rank, layer_transfers(old, new, topology))


def plan_rank(
    old: PhysicalToLogical, new: PhysicalToLogical, topology: EPTopology, rank: int, transfers: Sequence[Transfer]
) -> LayerPlan:
    """Plan one layer for one rank, of which :func:`layer_transfers` is known already.

    :raises InvalidPlacement: as :func:`plan_layer`
    """
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
    """List what all ranks send each other for one layer, in the order in which it is posted.

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


def matching_groups(transfers: Sequence[Transfer], limit: int) -> tuple[int, ...]:
    """Number the group that each transfer is posted in, so that no rank takes part in more than ``limit`` of one.

    Both sides of a transfer read its group from the same list, so they always agree.

    :param transfers: as :func:`layer_transfers` orders them
    :returns: one group number for each transfer, ascending from 0
    """
    groups: list[int] = []
    group = 0
    load: dict[int, int] = {}
    for transfer in transfers:
        ends = (transfer.src_rank, transfer.dst_rank)
        if any(load.get(rank, 0) >= limit for rank in ends):
            group += 1
            load = {}
        for rank in ends:
            load[rank] = load.get(rank, 0) + 1
        groups.append(group)
    return tuple(groups)


def staged_slot_counts(
    old: npt.NDArray[np.integer], new: npt.NDArray[np.integer], topology: EPTopology, rank: int
) -> npt.NDArray[np.int64]:
    """Count, per layer, the slots of ``rank`` that pass through staging, without planning: int64 ``[layers]``.

    :param old: ``[layers, physical]``
    :param new: ``[layers, physical]``
    """
    slots = topology.slots_of(rank)
    old_local, new_local = old[:, slots], new[:, slots]
    staged = (new_local != old_local) & (new_local != EMPTY_SLOT)
    held_here = (new_local[:, :, None] == old_local[:, None, :]).any(axis=2)
    same_as_earlier = np.tril(new_local[:, :, None] == new_local[:, None, :], k=-1).any(axis=2)
    free_rider = staged & ~held_here & same_as_earlier
    return np.asarray((staged & ~free_rider).sum(axis=1), dtype=np.int64)


def _row(maps: PhysicalToLogical, topology: EPTopology) -> list[int]:
    row = [int(expert) for expert in maps]
    if len(row) != topology.num_physical_experts:
        raise InvalidPlacement(
            f"a layer's map has {len(row)} physical experts; the topology has {topology.num_physical_experts}"
        )
    return row


def _ranks_by_expert(row: list[int], topology: EPTopology) -> dict[int, list[int]]:
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
    size, longer = divmod(len(destinations), len(sources))
    bounds = [i * size + min(i, longer) for i in range(len(sources) + 1)]
    return [
        Transfer(expert, source, destination, same_node)
        for source, (start, stop) in zip(sources, pairwise(bounds), strict=True)
        for destination in destinations[start:stop]
    ]
