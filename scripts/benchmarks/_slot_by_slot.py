"""The reference method of planning, as engines have it: for every slot and every held expert, look through the maps."""

from itertools import pairwise

from async_eplb import EPTopology, LayerPlan, SlotSource
from async_eplb.placement import EMPTY_SLOT
from async_eplb.plan import FanOut, LocalCopy, Recv, Send


def plan_slot_by_slot(old: list[int], new: list[int], topology: EPTopology, rank: int) -> LayerPlan:
    """Plan one layer for one rank, with the result of :func:`async_eplb.plan_layer`."""
    slots = topology.slots_of(rank)
    old_local, new_local = old[slots], new[slots]
    sources: list[SlotSource] = []
    copies: list[LocalCopy] = []
    recvs: list[Recv] = []
    fan_outs: list[FanOut] = []
    for slot, (before, after) in enumerate(zip(old_local, new_local, strict=True)):
        if after == EMPTY_SLOT:
            sources.append(SlotSource.EMPTY)
        elif before == after:
            sources.append(SlotSource.UNCHANGED)
        elif after in old_local:
            sources.append(SlotSource.SAME_GPU)
            copies.append(LocalCopy(old_local.index(after), slot))
        elif after in new_local[:slot]:
            sources.append(SlotSource.FREE_RIDER)
            fan_outs.append(FanOut(new_local.index(after), slot))
        else:
            near, far = _destinations_of_sources(old, new, topology, after)
            sources.append(SlotSource.SAME_NODE if any(rank in d for d in near.values()) else SlotSource.CROSS_NODE)
            recvs.append(Recv(after, next(s for chunks in (near, far) for s, d in chunks.items() if rank in d), slot))
    sends: list[Send] = []
    for expert in sorted(set(old_local) - {EMPTY_SLOT}):
        for chunks in _destinations_of_sources(old, new, topology, expert):
            sends += [Send(expert, dst, old_local.index(expert)) for dst in chunks.get(rank, [])]
    return LayerPlan(tuple(sources), tuple(copies), tuple(recvs), tuple(sends), tuple(fan_outs))


def _destinations_of_sources(
    old: list[int], new: list[int], topology: EPTopology, expert: int
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return which ranks each rank sends an expert to, within its node and to others."""
    holders = _ranks_with(old, topology, expert)
    takers = [rank for rank in _ranks_with(new, topology, expert) if rank not in holders]
    nodes = sorted({topology.node_of(rank) for rank in holders})
    near: dict[int, list[int]] = {}
    for node in nodes:
        near |= _chunks(
            [rank for rank in holders if topology.node_of(rank) == node],
            [rank for rank in takers if topology.node_of(rank) == node],
        )
    return near, _chunks(holders, [rank for rank in takers if topology.node_of(rank) not in nodes])


def _ranks_with(row: list[int], topology: EPTopology, expert: int) -> list[int]:
    return sorted({topology.rank_of(physical) for physical, held in enumerate(row) if held == expert})


def _chunks(sources: list[int], destinations: list[int]) -> dict[int, list[int]]:
    size, longer = divmod(len(destinations), max(1, len(sources)))
    bounds = [i * size + min(i, longer) for i in range(len(sources) + 1)]
    return {source: destinations[start:stop] for source, (start, stop) in zip(sources, pairwise(bounds), strict=True)}
