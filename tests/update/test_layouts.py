"""Experts move whatever their slots' layout in memory: dimensions in any order, padding, a tensor for each expert."""

import anyio
import pytest
import torch
from support.helpers import (
    TINY,
    MemoryRank,
    assert_same_layer,
    in_virtual_time,
    memory_world,
    on_all,
    two_placements,
)
from support.odd_layouts import oddly_laid_out
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, MemoryTransport, UpdateOptions
from async_eplb.errors import InvalidWeightSource, PlacementDisagreement
from async_eplb.plan import Planner
from async_eplb.transport import LaunchRule, MemorySchedule

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
OLD, NEW = two_placements(TOPOLOGY, num_layers=3, num_experts=8)
WITH_CHECKSUMS = UpdateOptions(verify="checksum", transfer_timeout_s=0.5, control_timeout_s=1.0)


async def serve(updater: ExpertUpdater, new: ExpertPlacement) -> None:
    """Make steps until an update has ended."""
    handle = updater.begin(new)
    while not handle.done:
        await updater.step()
        await anyio.sleep(0.001)
    await handle.wait()


def assert_audits(reports: list[object]) -> None:
    """No rank has found replicas that differ."""
    assert [getattr(report, "mismatches", report) for report in reports] == [()] * len(reports)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED, LaunchRule.ORDERED], ids=str)
@in_virtual_time
async def test_odd_layouts_are_moved(rule: LaunchRule, first: int) -> None:
    """In both modes, verified, audited; each tensor of the model once in each layout."""
    schedule = MemorySchedule(launch_rule=rule, control_s=0.001)
    async with memory_world(
        OLD, TOPOLOGY, schedule=schedule, options=WITH_CHECKSUMS, lay_out=lambda t: oddly_laid_out(t, first=first)
    ) as ranks:
        assert await on_all(ranks, serve, [NEW] * 4) == [None] * 4
        assert assert_same_layer(ranks, OLD) == 3
        await on_all(ranks, lambda updater: updater.update(OLD))
        assert assert_same_layer(ranks, NEW) == 3
        assert_audits(await on_all(ranks, lambda u, t: u.audit(t), MemoryTransport.world(4)))


@in_virtual_time
async def test_experts_that_are_apart_are_moved_by_relays() -> None:
    """Staging is what is passed on, and it is laid out by extents."""
    options = UpdateOptions(verify="checksum", planner=Planner("relayed"))
    async with memory_world(OLD, TOPOLOGY, options=options, lay_out=oddly_laid_out) as ranks:
        await on_all(ranks, lambda updater: updater.update(NEW))
        assert assert_same_layer(ranks, OLD) == 3


@in_virtual_time
async def test_ranks_that_lay_experts_out_differently_are_told() -> None:
    """Strides are in the digest: nothing is moved."""
    ways = iter(range(4))
    async with memory_world(
        OLD, TOPOLOGY, options=WITH_CHECKSUMS, lay_out=lambda t: oddly_laid_out(t, first=next(ways))
    ) as ranks:
        outcomes = await on_all(ranks, lambda updater: updater.update(NEW))
        assert [type(outcome) for outcome in outcomes] == [PlacementDisagreement] * 4
        assert assert_same_layer(ranks, OLD) == 0


class Rows:
    """Holds the tiny model's experts in the shapes of its tensors."""

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert, as checkpoints have it."""
        described = TINY.tensors().values()
        contents = zip(TINY.expert_bytes(layer, logical_expert), described, strict=True)
        return [content.view(dtype).view(shape) for content, (dtype, shape) in contents]


class Bytes:
    """Holds them as bytes, which says nothing of the order of dimensions."""

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert as bytes."""
        return [content.view(-1) for content in TINY.expert_bytes(layer, logical_expert)]


async def lose_rank_0(ranks: list[MemoryRank], source: object) -> list[object]:
    """Let the others recover without rank 0."""
    ranks[0].transport.die()
    return await on_all(ranks[1:], lambda u, t: u.recover(t, source=source), MemoryTransport.world(3))


@in_virtual_time
async def test_lost_experts_are_loaded_into_odd_layouts() -> None:
    """Elements go where they belong, padding stays, and replicas are equal all the same."""
    async with memory_world(OLD, TOPOLOGY, options=WITH_CHECKSUMS, lay_out=oddly_laid_out) as ranks:
        recoveries = await lose_rank_0(ranks, Rows())
        assert any(recovery.loaded for recovery in recoveries)  # type: ignore[attr-defined]
        for rank in ranks[1:]:
            rank.assert_consistent()
        assert_audits(await on_all(ranks[1:], lambda u, t: u.audit(t), MemoryTransport.world(3)))


@in_virtual_time
async def test_bytes_without_a_shape_are_not_guessed_at() -> None:
    """Where dimensions lie in another order, a source's tensors must have the slot's shape; their experts stay lost."""
    async with memory_world(OLD, TOPOLOGY, options=WITH_CHECKSUMS, lay_out=oddly_laid_out) as ranks:
        for recovery in await lose_rank_0(ranks, Bytes()):
            assert recovery.missing == recovery.lost != {}  # type: ignore[attr-defined]
        for rank in ranks[1:]:
            rank.assert_consistent()


@pytest.mark.parametrize("source", [None, 3, [None], [torch.zeros(2).to_sparse()]], ids=str)
@in_virtual_time
async def test_a_source_that_holds_no_tensors_is_refused(source: object) -> None:
    """What it returns is checked as live weights are."""

    class Strange:
        def load(self, *_: int) -> object:
            return source

    async with memory_world(OLD, TOPOLOGY, options=WITH_CHECKSUMS) as ranks:
        for recovery in await lose_rank_0(ranks, Strange()):
            assert not isinstance(recovery, InvalidWeightSource)
            assert recovery.missing == recovery.lost != {}  # type: ignore[attr-defined]
