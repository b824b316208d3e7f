"""Audits: the bytes of all replicas of all experts are compared across ranks, on demand."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from async_eplb.device import Device
from async_eplb.events.stopwatch import Stopwatch
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.scratch import Scratch
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.transport.identity import Identity
from async_eplb.transport.one_round import hold_round
from async_eplb.transport.renumbered import RenumberedControlGroup
from async_eplb.verify.column import checksum_scratch_nbytes, checksums
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Work, Workers


@dataclass(frozen=True, slots=True)
class ReplicaMismatch:
    """Replicas of one expert whose bytes are not all the same.

    :param physical_experts: replicas that differ from the most common bytes; all replicas if no bytes are most common
    """

    layer: int
    logical_expert: int
    physical_experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Result of an audit, the same on every rank except for ``nbytes`` and ``duration_ms``.

    :param num_slots: slots that were read, over all ranks
    :param num_compared: experts of layers that have several replicas
    :param nbytes: bytes that this rank has read
    """

    num_slots: int
    num_compared: int
    nbytes: int
    duration_ms: float
    mismatches: tuple[ReplicaMismatch, ...]


async def audit_replicas(
    weights: ExpertWeights,
    placement: ExpertPlacement,
    topology: EPTopology,
    *,
    members: Sequence[int],
    rank: int,
    group: Transport,
    device: Device,
    workers: Workers,
    control_timeout_s: float,
    open_timeout_s: float,
    identity: Identity,
) -> AuditReport:
    """Compare the bytes of all replicas of all experts. All ranks of ``members`` call this together.

    :param members: rank in the EP group of each rank of ``group``, in order
    :param group: a new transport; it is used for one control round and closed
    :param workers: other ones than the updater's, whose control rounds go on meanwhile
    :param identity: what ranks compare first
    :raises OpenTimeout: if a rank does not come within ``open_timeout_s``, in seconds
    :raises BrokenControlGroup: if one does not take part within ``control_timeout_s``, in seconds
    """
    watch = Stopwatch()
    mine = await workers.run(Work.TRANSFER, lambda: slot_checksums(weights, placement, topology, rank, device))
    try:
        control = await group.open(
            device,
            workers,
            weights,
            control_timeout_s=control_timeout_s,
            open_timeout_s=open_timeout_s,
            identity=identity,
        )
        rows = await hold_round(RenumberedControlGroup(control, members), mine)
    finally:
        await group.aclose()
    sums = dict(zip(members, rows, strict=True))
    compared, mismatches = compare(sums, weights.rows, placement, topology)
    return AuditReport(
        num_slots=sum(len(row) for row in rows),
        num_compared=compared,
        nbytes=sum(sum(weights.slot_nbytes(row)) for row in weights.rows) * topology.num_local_physical_experts,
        duration_ms=watch.ms(),
        mismatches=mismatches,
    )


def slot_checksums(
    weights: ExpertWeights, placement: ExpertPlacement, topology: EPTopology, rank: int, device: Device
) -> list[int]:
    """Return a checksum of each slot of each layer that has weights, layer by layer; 0 for empty slots. Blocks.

    :returns: as many numbers as layers times slots, 64 bits each, signed
    """
    local = placement.physical_to_logical_map[:, topology.slots_of(rank)]
    sums = torch.zeros((len(weights.rows), local.shape[1]), dtype=torch.int64)
    num_parts = max(len(weights.slot_nbytes(row)) for row in weights.rows)
    with device.committing(), torch.no_grad():
        scratch = Scratch(device, checksum_scratch_nbytes(local.shape[1], num_parts))
        for place, row in enumerate(weights.rows):
            held = np.flatnonzero(local[row] != EMPTY_SLOT)
            if len(held):
                contents = [[tensor.content(slot) for tensor in weights.tensors[row]] for slot in held.tolist()]
                scratch.clear()
                sums[place, torch.from_numpy(held)] = checksums(contents, scratch).cpu()
    values: list[int] = sums.flatten().tolist()
    return values


def compare(
    sums: Mapping[int, Sequence[int]], rows: Sequence[int], placement: ExpertPlacement, topology: EPTopology
) -> tuple[int, tuple[ReplicaMismatch, ...]]:
    """Compare the replicas of each expert; return how many experts have several, and those whose bytes differ. Pure.

    :param sums: rank → what :func:`slot_checksums` returned there
    :param rows: layers that have weights
    """
    slots = topology.num_local_physical_experts
    compared, mismatches = 0, []
    for number, row in enumerate(rows):
        replicas: dict[int, dict[int, int]] = defaultdict(dict)
        for rank, values in sums.items():
            held = placement.physical_to_logical_map[row, topology.slots_of(rank)].tolist()
            for slot, expert in enumerate(held):
                if expert != EMPTY_SLOT:
                    replicas[expert][rank * slots + slot] = values[number * slots + slot]
        for expert, found in sorted(replicas.items()):
            compared += len(found) > 1
            wrong = _differing(found)
            if wrong:
                mismatches.append(ReplicaMismatch(row, expert, wrong))
    return compared, tuple(mismatches)


def _differing(found: Mapping[int, int]) -> tuple[int, ...]:
    """Return the replicas that differ from the most common checksum, or all if no checksum is the most common.

    :param found: physical expert → checksum
    """
    (common, count), *others = Counter(found.values()).most_common(2)
    if not others:
        return ()
    tied = others[0][1] == count
    return tuple(sorted(physical for physical, value in found.items() if tied or value != common))
