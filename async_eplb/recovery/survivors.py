"""What is left of a placement when ranks are lost, and where experts that nobody holds any more can go. Pure."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from async_eplb.arguments import SetOf, Whole, take
from async_eplb.errors import InvalidOptions, InvalidPlacement
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology


class Home(NamedTuple):
    """Where a lost expert goes."""

    layer: int
    logical_expert: int
    physical_expert: int


def without_ranks(placement: ExpertPlacement, topology: EPTopology, dead: Iterable[int]) -> ExpertPlacement:
    """Return the placement with the slots of ``dead`` ranks empty."""
    table = placement.physical_to_logical_map.copy()
    for rank in dead:
        table[:, topology.slots_of(rank)] = EMPTY_SLOT
    return ExpertPlacement.from_mapping(table, placement.num_logical_experts)


def on_survivors(placement: ExpertPlacement, topology: EPTopology, members: Collection[int]) -> ExpertPlacement:
    """Spread a placement for the survivors alone over the slots of the whole group; slots of the dead stay empty.

    So a policy can be asked for a placement of ``len(members)`` ranks.

    :param placement: one column for each slot of the survivors, in rank order
    :param members: ranks that are left
    :raises InvalidPlacement: if it has another number of columns
    :raises InvalidOptions: if a member is no rank
    """
    members = take(members, SetOf(Whole(0, topology.num_ranks - 1)), "members", InvalidOptions)
    slots = topology.num_local_physical_experts
    if placement.num_physical_experts != len(members) * slots:
        raise InvalidPlacement(
            f"the placement has {placement.num_physical_experts} physical experts; {len(members)} ranks of {slots} "
            f"slots have {len(members) * slots}"
        )
    table = np.full((placement.num_layers, topology.num_physical_experts), EMPTY_SLOT, dtype=np.int32)
    for place, rank in enumerate(sorted(members)):
        table[:, topology.slots_of(rank)] = placement.physical_to_logical_map[:, place * slots : (place + 1) * slots]
    return ExpertPlacement.from_mapping(table, placement.num_logical_experts)


def homes(placement: ExpertPlacement, topology: EPTopology, dead: Collection[int]) -> tuple[Home, ...]:
    """Choose a slot for each expert without a replica, as far as there are any.

    An empty slot is taken first, then one whose expert has the most replicas; among equals, one of the rank that
    takes the fewest so far.

    :param placement: without the slots of ``dead`` ranks
    """
    live = [rank for rank in range(topology.num_ranks) if rank not in dead]
    taken: dict[int, int] = dict.fromkeys(live, 0)
    chosen: list[Home] = []
    for layer, experts in placement.unplaced().items():
        row = placement.physical_to_logical_map[layer].tolist()
        for expert in experts:
            candidates = [
                (row[slot] != EMPTY_SLOT, -row.count(row[slot]), taken[rank], slot)
                for rank in live
                for slot in range(topology.slots_of(rank).start, topology.slots_of(rank).stop)
                if row[slot] == EMPTY_SLOT or row.count(row[slot]) > 1
            ]
            if not candidates:
                break
            slot = min(candidates)[-1]
            row[slot] = expert
            taken[topology.rank_of(slot)] += 1
            chosen.append(Home(layer, expert, slot))
    return tuple(chosen)


def vacated(placement: ExpertPlacement, found: Iterable[Home]) -> ExpertPlacement:
    """Return the placement with these slots empty, whatever they hold."""
    return with_homes(placement, (home._replace(logical_expert=EMPTY_SLOT) for home in found))


def with_homes(placement: ExpertPlacement, found: Iterable[Home]) -> ExpertPlacement:
    """Return the placement with experts in their new homes."""
    table = placement.physical_to_logical_map.copy()
    for home in found:
        table[home.layer, home.physical_expert] = home.logical_expert
    return ExpertPlacement.from_mapping(table, placement.num_logical_experts)


def by_layer(found: Iterable[Home]) -> Mapping[int, tuple[Home, ...]]:
    """Group homes by their layer, in order."""
    grouped: dict[int, tuple[Home, ...]] = {}
    for home in found:
        grouped[home.layer] = (*grouped.get(home.layer, ()), home)
    return grouped
