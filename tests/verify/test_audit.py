"""An audit finds replicas that differ, wherever they are, and returns the same on every rank."""

from typing import Any

import anyio
import pytest
from support.helpers import in_virtual_time, memory_world, on_all

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    MemoryTransport,
    TorchDistTransport,
    UpdateOptions,
)
from async_eplb.errors import BusyUpdater, ClosedUpdater
from async_eplb.testing.processes import World, WorldRank
from async_eplb.testing.sample_model import SampleModel
from async_eplb.verify.audit import AuditReport, ReplicaMismatch, compare

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
PLACEMENT = ExpertPlacement.from_mapping([[0, 1, 0, 2, 0, -1], [0, 1, 2, 2, 1, 0]])


async def audits(ranks: list[Any]) -> list[AuditReport]:
    """Audit on all ranks."""
    return await on_all(ranks, ExpertUpdater.audit, MemoryTransport.world(len(ranks)))


@in_virtual_time
async def test_replicas_that_differ_are_found() -> None:
    """One byte of one replica; of two replicas, either may be the right one."""
    async with memory_world(PLACEMENT, TOPOLOGY, options=UpdateOptions(verify="checksum")) as ranks:
        reports = await audits(ranks)
        assert [report.mismatches for report in reports] == [()] * 3
        assert {(report.num_slots, report.num_compared) for report in reports} == {(12, 4)}
        for layer, slot in ((0, 0), (1, 1)):
            ranks[2].tensors[layer][3][slot, 0, 0] += 1.0
        found = (ReplicaMismatch(0, 0, (4,)), ReplicaMismatch(1, 0, (0, 5)))
        assert [report.mismatches for report in await audits(ranks)] == [found] * 3


@in_virtual_time
async def test_no_audit_during_an_update() -> None:
    """Nor after leaving."""
    async with memory_world(PLACEMENT, TOPOLOGY) as ranks:
        handle = ranks[0].updater.begin(PLACEMENT.with_layers(ExpertPlacement.trivial(2, 6, 3), (0,)))
        with pytest.raises(BusyUpdater):
            await ranks[0].updater.audit(MemoryTransport.world(1)[0])
        handle.cancel()
    with pytest.raises(ClosedUpdater):
        await ranks[0].updater.audit(MemoryTransport.world(1)[0])


def test_comparing_needs_several_replicas() -> None:
    """An expert with one replica has nothing to be compared with; ranks that are gone give no sums."""
    sums = {0: [7, 8, 1, 2], 1: [7, 9, 3, 3]}
    assert compare(sums, [0, 1], PLACEMENT, TOPOLOGY) == (2, ())


def audit_rank(world: WorldRank) -> AuditReport:
    """Audit over gloo, beside the updater's own control rounds."""

    async def audit() -> AuditReport:
        tensors = SampleModel(hidden=8, intermediate=4).weights(PLACEMENT, TOPOLOGY, world.rank)
        if world.rank == 2:
            tensors[0][3][0, 0, 0] += 1.0
        updater = ExpertUpdater(
            ExpertWeights(tensors), PLACEMENT, TOPOLOGY, rank=world.rank, transport=TorchDistTransport()
        )
        async with updater:
            return await updater.audit(TorchDistTransport())

    return anyio.run(audit)


def test_processes_audit_beside_their_control_rounds() -> None:
    """A replica that differs is found, by all ranks."""
    for report in World(3, timeout_s=60).run(audit_rank):
        assert report.mismatches == (ReplicaMismatch(0, 0, (4,)),)
