"""Weights that change place: told before anything moves, and rebound inside a pause."""

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from support.helpers import MemoryRank, assert_same_layer, in_virtual_time, memory_world, on_all, two_placements
from support.odd_layouts import oddly_laid_out
from torch import Tensor

from async_eplb import EPTopology, ExpertUpdater, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.errors import (
    BrokenControlGroup,
    BrokenTransport,
    BusyUpdater,
    ClosedUpdater,
    InvalidWeights,
    IpcUnavailable,
    MovedWeights,
    TransferTimeout,
    UpdateAborted,
    UpdateNotBegun,
)
from async_eplb.transport import Fault, FaultKind, LaunchRule, MemorySchedule
from async_eplb.weights import Slots

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
OLD, NEW = two_placements(TOPOLOGY, num_layers=2, num_experts=4)
OPTIONS = UpdateOptions(verify="checksum", transfer_timeout_s=0.5, control_timeout_s=1.0)
SCHEDULE = MemorySchedule(control_s=0.01)


def elsewhere(tensors: Mapping[int, Sequence[Slots]]) -> dict[int, list[Slots]]:
    """Return equal weights of the same layouts in other memory."""
    return {row: [_copied(each) for each in given] for row, given in tensors.items()}


def _copied(each: Slots) -> Slots:
    if not isinstance(each, Tensor):
        return [_copied(slot) for slot in each]  # type: ignore[misc]
    storage = each.untyped_storage().clone()  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=each.dtype).set_(storage, each.storage_offset(), each.shape, each.stride())


def move(tensor: Tensor) -> None:
    """Do what a weight loader does that makes parameters anew."""
    tensor.data = tensor.data.clone()


def free(tensor: Tensor) -> None:
    """Do what sleep modes do that give memory back."""
    tensor.untyped_storage().resize_(0)


def fail(tensor: Tensor) -> None:
    """Move, and fail to load."""
    move(tensor)
    raise OSError("no file")


async def move_in_a_pause(
    updater: ExpertUpdater, tensors: Sequence[Tensor], how: Callable[[Tensor], None] = move
) -> None:
    """Let tensors change place, and rebind none."""
    async with updater.paused():
        for tensor in tensors:
            how(tensor)


async def rebind(ranks: Sequence[MemoryRank]) -> list[MemoryRank]:
    """Give all ranks equal weights elsewhere, inside a pause, and spoil the ones before."""

    async def change(updater: ExpertUpdater, rank: MemoryRank) -> MemoryRank:
        async with updater.paused():
            tensors = elsewhere(rank.tensors)
            await updater.rebind(ExpertWeights(tensors))
        return MemoryRank(updater, tensors, rank.transport)

    changed = await on_all(ranks, change, ranks)
    for rank in ranks:
        weights = ExpertWeights(rank.tensors)
        for row in weights.rows:
            for slot in range(3):
                for view in weights.slot_views(row, slot):
                    view.fill_(0x5A)
    return changed


def assert_spoilt(ranks: Sequence[MemoryRank]) -> None:
    """Nothing has written to weights that were replaced."""
    for rank in ranks:
        weights = ExpertWeights(rank.tensors)
        for row in weights.rows:
            assert all((view == 0x5A).all() for slot in range(3) for view in weights.slot_views(row, slot))


@pytest.mark.parametrize("rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED, LaunchRule.ORDERED], ids=str)
@in_virtual_time
async def test_rebound_weights_are_moved(rule: LaunchRule) -> None:
    """And only they, by two-sided and one-sided transports, verified and audited, any number of times."""
    schedule = MemorySchedule(launch_rule=rule, control_s=0.01)
    async with memory_world(OLD, TOPOLOGY, schedule=schedule, options=OPTIONS, lay_out=oddly_laid_out) as ranks:
        await on_all(ranks, lambda updater: updater.update(NEW))
        here = ranks
        for old, new in ((NEW, OLD), (OLD, NEW)):
            before, here = here, await rebind(here)
            await on_all(here, lambda updater, new=new: updater.update(new))
            assert assert_same_layer(here, old) == 2
            assert_spoilt(before)
        reports = await on_all(here, lambda u, t: u.audit(t), MemoryTransport.world(2, SCHEDULE))
        assert [report.mismatches for report in reports] == [()] * 2


@in_virtual_time
async def test_nothing_keeps_replaced_weights() -> None:
    """Byte views of them are gone with the rank that had them, so their memory can be freed."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        await on_all(ranks, lambda updater: updater.update(NEW))
        addresses = {rank.tensors[0][0].data_ptr() for rank in ranks}
        of_all = (each for each in gc.get_objects() if type(each) is ExpertWeights)
        kept = [weakref.ref(each) for each in of_all if each.addresses(0, [0])[0, 0] in addresses]
        assert len(kept) == 2 * len(ranks)  # with and without the verification's column
        await rebind(ranks)
        gc.collect()
        assert [reference() for reference in kept] == [None] * len(kept)


@in_virtual_time
async def test_weights_that_moved_are_told_before_anything_moves() -> None:
    """At the end of the pause, which is over then, and whenever they would be read; others see who has not begun."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        updater = ranks[0].updater
        with pytest.raises(MovedWeights, match="tensor 2 of row 1") as caught:
            await move_in_a_pause(updater, [ranks[0].tensors[1][2]])
        assert (caught.value.tensors, caught.value.layers) == (("tensor 2 of row 1",), (1,))
        await updater.step()
        await ranks[1].updater.step()
        outcomes = await on_all(ranks, lambda updater: updater.update(NEW))
        assert [type(outcome) for outcome in outcomes] == [MovedWeights, UpdateNotBegun]
        with pytest.raises(MovedWeights):
            updater.begin(NEW)
        with pytest.raises(MovedWeights):
            await anext(updater.stream(NEW))
        with pytest.raises(MovedWeights):
            await updater.audit(MemoryTransport.world(1, SCHEDULE)[0])
        with pytest.raises(MovedWeights):
            await updater.recover(MemoryTransport.world(1, SCHEDULE)[0])
        assert assert_same_layer(ranks, OLD) == 0


@in_virtual_time
async def test_weights_can_be_rebound_after_the_error() -> None:
    """In another pause; freed memory is noticed as other memory is."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        kept = [elsewhere(rank.tensors) for rank in ranks]
        for rank, tensors in zip(ranks, kept, strict=True):
            with pytest.raises(MovedWeights):
                await move_in_a_pause(rank.updater, [given[0] for given in rank.tensors.values()], free)
            async with rank.updater.paused():
                await rank.updater.rebind(ExpertWeights(tensors))
        changed = [MemoryRank(rank.updater, t, rank.transport) for rank, t in zip(ranks, kept, strict=True)]
        await on_all(changed, lambda updater: updater.update(NEW))
        assert assert_same_layer(changed, OLD) == 2


@in_virtual_time
async def test_an_error_in_the_pause_comes_first() -> None:
    """What the caller raises is what the caller gets."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE) as ranks:
        with pytest.raises(OSError, match="no file"):
            await move_in_a_pause(ranks[0].updater, [ranks[0].tensors[0][0]], fail)


@in_virtual_time
async def test_weights_are_rebound_inside_a_pause_only() -> None:
    """Not while serving, idle, updating, or when the updater is not open."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        updater, weights = ranks[0].updater, ExpertWeights(elsewhere(ranks[0].tensors))
        with pytest.raises(BusyUpdater, match="inside paused"):
            await updater.rebind(weights)
        async with updater.idle():
            with pytest.raises(BusyUpdater, match="inside paused"):
                await updater.rebind(weights)
        handles = [rank.updater.begin(NEW) for rank in ranks]
        with pytest.raises(BusyUpdater, match="inside paused"):
            await updater.rebind(weights)
        for handle in handles:
            handle.cancel()
    with pytest.raises(ClosedUpdater):
        await updater.rebind(weights)


@in_virtual_time
async def test_weights_of_another_layout_are_not_rebound() -> None:
    """The ones before stay, and so does the updater."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        updater, tensors = ranks[0].updater, ranks[0].tensors
        others: list[Any] = [
            {0: tensors[0]},
            {row: given[:-1] for row, given in tensors.items()},
            oddly_laid_out(tensors),
            {row: [each[:2] for each in given] for row, given in tensors.items()},
        ]
        async with updater.paused():
            for other in others:
                with pytest.raises(InvalidWeights, match="the new weights"):
                    await updater.rebind(ExpertWeights(other))
            with pytest.raises(InvalidWeights, match="give ExpertWeights"):
                await updater.rebind(tensors)  # type: ignore[arg-type]
        await on_all(ranks, lambda updater: updater.update(NEW))
        assert assert_same_layer(ranks, OLD) == 2


@in_virtual_time
async def test_experts_may_come_apart() -> None:
    """Equal layouts of slots, whether in one block or in many."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, lay_out=oddly_laid_out) as ranks:
        for rank in ranks:
            async with rank.updater.paused():
                tensors = {row: [_one_by_one(each) for each in given] for row, given in rank.tensors.items()}
                await rank.updater.rebind(ExpertWeights(tensors))
        await on_all(ranks, lambda updater: updater.update(NEW))
        assert assert_same_layer(ranks, OLD) == 2


def _one_by_one(given: Slots) -> Slots:
    return [*given] if isinstance(given, Tensor) else given


class Unable(MemoryTransport):
    """A transport that cannot read new weights."""

    async def rebind(self, weights: ExpertWeights) -> None:
        """Refuse."""
        raise IpcUnavailable(f"no handles for rows {weights.rows}", ranks=(0, 1))


@in_virtual_time
async def test_a_transport_that_cannot_read_new_weights() -> None:
    """The error is typed, and the updater goes on over another transport, with the new weights."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        changed = []
        for rank in ranks:
            rank.transport.__class__ = Unable
            tensors = elsewhere(rank.tensors)
            async with rank.updater.paused():
                with pytest.raises(IpcUnavailable):
                    await rank.updater.rebind(ExpertWeights(tensors))
            changed.append(MemoryRank(rank.updater, tensors, rank.transport))
            with pytest.raises(ClosedUpdater, match="could not be rebound"):
                rank.updater.begin(NEW)
        await on_all(changed, lambda u, t: u.recover(t), MemoryTransport.world(2, SCHEDULE))
        await on_all(changed, lambda updater: updater.update(NEW))
        assert assert_same_layer(changed, OLD) == 2


@pytest.mark.parametrize("rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED], ids=str)
@in_virtual_time
async def test_weights_are_rebound_after_a_recovery(rule: LaunchRule) -> None:
    """Where the transport counts its own ranks; a recovery uses the weights that there are by then."""
    schedule = MemorySchedule(launch_rule=rule, control_s=0.01)
    async with memory_world(OLD, TOPOLOGY, schedule=schedule, options=OPTIONS) as ranks:
        here = await rebind(ranks)
        await on_all(here, lambda u, t: u.recover(t), MemoryTransport.world(2, schedule))
        here = await rebind(here)
        await on_all(here, lambda updater: updater.update(NEW))
        assert assert_same_layer(here, OLD) == 2
        assert not isinstance(here[0], BrokenControlGroup)


@pytest.mark.parametrize("rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED], ids=str)
@in_virtual_time
async def test_weights_are_rebound_after_a_failed_update(rule: LaunchRule) -> None:
    """The transport that replaces the broken one is opened with the weights that there are by then."""
    lost = tuple(Fault(FaultKind.DROP, src, dst, 0) for src, dst in ((0, 1), (1, 0)))
    schedule = MemorySchedule(launch_rule=rule, control_s=0.01, faults=lost)
    async with memory_world(OLD, TOPOLOGY, schedule=schedule, options=OPTIONS) as ranks:
        outcomes = await on_all(ranks, lambda updater: updater.update(NEW))
        assert {type(outcome) for outcome in outcomes} <= {TransferTimeout, BrokenTransport, UpdateAborted}
        here = await rebind(ranks)
        await on_all(here, lambda updater: updater.update(NEW))
        assert assert_same_layer(here, OLD) == 2
        assert_spoilt(ranks)
