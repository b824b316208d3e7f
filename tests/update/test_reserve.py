"""Staging is reserved when an updater opens: how much, which updates fit it, and that nothing is allocated after."""

from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    TINY,
    MemoryRank,
    in_virtual_time,
    memory_ranks,
    memory_world,
    on_all,
    two_placements,
)
from support.updates import PLANNERS, Update, examples, updates
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.device import CpuDevice
from async_eplb.errors import InvalidOptions, StagingTooSmall
from async_eplb.plan import Planner
from async_eplb.staging import BufferSize, StagingPool
from async_eplb.sync import SyncUpdater
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.update.reserve import require_staging

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
OLD, NEW = two_placements(TOPOLOGY, 3, num_experts=8)
SLOT_NBYTES = 5 * 256
"""Of the tiny model, aligned."""
SCRATCH_NBYTES = 4 * 256
"""For the four map rows of a layer, if none has more than 32 entries."""
_SLOT_WIDTHS = (1, 256, 700)
"""Bytes of a slot of each layer, in drawn updates."""


@dataclass
class Allocations:
    """Bytes of each allocation, in order.

    :param failing: number of the allocation on the device that fails; -1: none
    """

    on_device: list[int] = field(default_factory=list)
    on_host: list[int] = field(default_factory=list)
    failing: int = -1


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """Note what all CPU devices allocate."""
    noted = Allocations()
    kinds = {"allocate": noted.on_device, "allocate_host": noted.on_host}

    def noting(name: str) -> None:
        genuine = getattr(CpuDevice, name)

        def allocate(device: CpuDevice, nbytes: int) -> Tensor:
            if nbytes:
                if name == "allocate" and len(noted.on_device) == noted.failing:
                    noted.failing = -1
                    raise MemoryError("the device is full")
                kinds[name].append(nbytes)
            return genuine(device, nbytes)  # type: ignore[no-any-return]

        monkeypatch.setattr(CpuDevice, name, allocate)

    for name in kinds:
        noting(name)
    return noted


@examples
@given(updates(), st.integers(1, 4), st.sampled_from(PLANNERS))
def test_an_update_is_refused_if_any_rank_stages_more_than_fits(update: Update, num_fit: int, planner: Planner) -> None:
    """Whatever the planner: then some layer has more slots in some rank's plan. All ranks compute the same answer."""
    num_slots, num_layers = update.topology.num_local_physical_experts, update.old.num_layers
    weights = ExpertWeights(
        {row: [torch.zeros(num_slots, _SLOT_WIDTHS[row], dtype=torch.uint8)] for row in range(num_layers)}
    )
    size = BufferSize(num_fit * 256)
    rows = tuple(range(num_layers))
    needed = {
        (row, rank): len(layer.staged_slots) * StagingPool.layer_nbytes(1, weights.slot_nbytes(row))
        for rank, plan in enumerate(update.plans(planner))
        for row, layer in enumerate(plan)
    }
    arguments: dict[str, Any] = {"weights": weights, "topology": update.topology, "size": size}
    if max(needed.values()) <= size.slots_nbytes:
        require_staging(update.old, update.new, rows, **arguments)
        return
    with pytest.raises(StagingTooSmall) as caught:
        require_staging(update.old, update.new, rows, **arguments)
    error = caught.value
    assert error.layer == min(row for (row, _), nbytes in needed.items() if nbytes > size.slots_nbytes)
    assert needed[error.layer, error.rank] == error.needed_nbytes
    assert error.needed_nbytes == max(nbytes for (row, _), nbytes in needed.items() if row == error.layer)
    assert error.reserved_nbytes == size.slots_nbytes


@in_virtual_time
async def test_an_update_that_does_not_fit_is_refused_on_all_ranks() -> None:
    """Also by ranks that stage nothing; nothing has changed, and what fits is moved."""
    old, small, large = (
        ExpertPlacement.from_mapping([[*row, 6, 7, 8, 9, 10, 11]] * 2)
        for row in ([0, 1, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5], [0, 4, 3, 2, 1, 5])
    )
    options = UpdateOptions(reserve_nbytes=2 * SLOT_NBYTES)
    async with memory_world(old, TOPOLOGY, options=options) as ranks:
        for refused in await on_all(ranks, lambda u: u.update(large)):
            assert isinstance(refused, StagingTooSmall)
            assert (refused.layer, refused.rank) == (0, 0)
            assert (refused.needed_nbytes, refused.reserved_nbytes) == (2 * SLOT_NBYTES, SLOT_NBYTES)
        for rank in ranks:
            assert rank.updater.placement == old
            assert [buffer.memory.nbytes for buffer in rank.updater.staging] == [SLOT_NBYTES] * 2
        for placement in (small, old, small):
            summaries = await on_all(ranks, lambda u, placement=placement: u.update(placement))
            assert [summary.layers for summary in summaries] == [(0, 1)] * 4
            for rank in ranks:
                rank.assert_consistent()


def test_a_whole_layer_is_reserved_in_each_buffer() -> None:
    """Of the largest layer, with the verification column; or what is asked for, in equal aligned shares."""
    tensors = {0: [torch.zeros(3, 100)], 1: [torch.zeros(3, 100), torch.zeros(3, 1)]}
    for options, nbytes in (
        (UpdateOptions(), 3 * (512 + 256)),
        (UpdateOptions(verify="canary"), 3 * (512 + 256 + 256)),
        (UpdateOptions(staging_depth=3, reserve_nbytes=3 * 2560 - 1), 2304),
        (UpdateOptions(staging_depth=1, reserve_nbytes=1 << 20), 1 << 20),
    ):
        (transport,) = MemoryTransport.world(1)
        topology = EPTopology(1, 1, 3)
        placement = ExpertPlacement.from_mapping([[0, 1, 2]] * 2)
        updater = ExpertUpdater(
            ExpertWeights(tensors), placement, topology, rank=0, transport=transport, options=options
        )

        async def main(updater: ExpertUpdater = updater, nbytes: int = nbytes) -> None:
            async with updater:
                assert {buffer.memory.nbytes for buffer in updater.staging} == {nbytes}

        anyio.run(main)


@pytest.mark.parametrize("reserve_nbytes", [0, -1, 1, 2 * SLOT_NBYTES - 1])
def test_a_buffer_holds_one_slot_at_least(reserve_nbytes: int) -> None:
    """Or no update could ever move that layer."""
    with pytest.raises(InvalidOptions, match="reserve_nbytes is") as caught:
        memory_ranks(OLD, TOPOLOGY, options=UpdateOptions(reserve_nbytes=reserve_nbytes))
    assert caught.value.option == "reserve_nbytes"


async def move(ranks: list[MemoryRank]) -> None:
    """Update there and back, alone and beside serving."""

    async def beside(updater: ExpertUpdater) -> None:
        handle = updater.begin(OLD)
        async with updater.idle():
            await handle.wait()

    for call in (lambda u: u.update(NEW), beside):
        assert not [each for each in await on_all(ranks, call) if isinstance(each, Exception)]
    for rank in ranks:
        rank.assert_consistent()


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((rule, UpdateOptions(verify="checksum")) for rule in LaunchRule),
        (LaunchRule.AT_ONCE, UpdateOptions()),
        (LaunchRule.AT_ONCE, UpdateOptions(verify="canary", staging_depth=3, planner=Planner("relayed"))),
    ],
    ids=lambda value: value.verify if isinstance(value, UpdateOptions) else value.name,
)
@in_virtual_time
async def test_updates_allocate_nothing(allocations: Allocations, rule: LaunchRule, options: UpdateOptions) -> None:
    """Neither on the device nor pinned on the host, from when updaters are open until they are left."""
    async with memory_world(OLD, TOPOLOGY, schedule=MemorySchedule(launch_rule=rule), options=options) as ranks:
        assert allocations.on_device
        before = list(allocations.on_device), list(allocations.on_host)
        await move(ranks)
        assert (allocations.on_device, allocations.on_host) == before


@pytest.mark.parametrize("verify", ["off", "checksum"])
@in_virtual_time
async def test_what_is_reserved_is_known_before_opening(allocations: Allocations, verify: str) -> None:
    """It is what is allocated then, and tables and the verification column, which are there already."""
    topology = EPTopology(1, 1, 3)
    old, _ = two_placements(topology, 2, num_experts=2)
    (rank,) = memory_ranks(old, topology, options=UpdateOptions(verify=verify, staging_depth=3))
    assert allocations.on_device == []
    before = rank.updater.reserved_nbytes
    column_nbytes = 16 * 3 * 2 if verify == "checksum" else 0
    table_nbytes = 8 * 2 * (3 + 2 * 2 + 2 + 2 + 1)
    async with rank.updater:
        assert sum(allocations.on_device) + table_nbytes + column_nbytes == before == rank.updater.reserved_nbytes
        assert sum(allocations.on_device) >= 3 * 3 * SLOT_NBYTES


def test_the_synchronous_face_says_it_too() -> None:
    """Before it is entered."""
    plain, synchronous = (
        kind(ExpertWeights(TINY.weights(OLD, TOPOLOGY, 0)), OLD, TOPOLOGY, rank=0, transport=transport)
        for kind, (transport, *_) in ((kind, MemoryTransport.world(4)) for kind in (ExpertUpdater, SyncUpdater))
    )
    assert plain.reserved_nbytes == synchronous.reserved_nbytes > 0


@in_virtual_time
async def test_a_rank_without_memory_for_staging_does_not_open(allocations: Allocations) -> None:
    """Its error says how much that is, and which option."""
    topology = EPTopology(1, 1, 3)
    old, _ = two_placements(topology, 2, num_experts=2)
    (rank,) = memory_ranks(old, topology)
    allocations.failing = 0
    with pytest.raises(MemoryError) as caught:
        async with rank.updater:
            pass
    (note,) = caught.value.__notes__
    assert note.startswith(
        f"staging takes {2 * 3 * SLOT_NBYTES + 2 * SCRATCH_NBYTES} bytes; UpdateOptions.reserve_nbytes"
    )
