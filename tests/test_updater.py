"""The updater in a world in memory: updates, streams, refusals, faults."""

import time
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import pytest
from blockbuster import BlockingError
from support.helpers import TINY, MemoryRank, float_weights, memory_world, on_all, together, two_placements

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    MemoryTransport,
    SlotSource,
    UpdateOptions,
)
from async_eplb.errors import (
    BrokenTransport,
    BusyTransport,
    BusyUpdater,
    ChecksumMismatch,
    ClosedUpdater,
    EplbError,
    InvalidOptions,
    InvalidPlacement,
    LayerCountMismatch,
    MissingWeights,
    PlacementDisagreement,
    RankMismatch,
    SlotCountMismatch,
    TransferTimeout,
    UnplacedExpert,
    UpdateAborted,
    UpdateCancelled,
)
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import Fault, FaultKind, MemorySchedule
from async_eplb.workers import ThreadWorkers

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
SMALL = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)

pytestmark = pytest.mark.anyio


async def update_all(ranks: list[MemoryRank], new: ExpertPlacement, **options: Any) -> list[object]:
    return await on_all(ranks, lambda u: u.update(new, **options))


@pytest.mark.parametrize("verify", ["off", "canary", "checksum"])
@pytest.mark.parametrize("depth", [1, 2, 5])
async def test_weights_and_maps_become_the_new_placement(verify: str, depth: int) -> None:
    """After an update every slot holds the expert that every published map names."""
    old, new = two_placements(TOPOLOGY, num_layers=6, num_experts=8)
    options = UpdateOptions(verify=verify, staging_depth=depth)
    async with memory_world(old, TOPOLOGY, options=options, workers=ThreadWorkers) as ranks:
        summaries = await update_all(ranks, new)
        for rank, summary in zip(ranks, summaries, strict=True):
            assert not isinstance(summary, Exception)
            assert rank.updater.placement == new
            assert rank.updater.expert_map.layer_generation.tolist() == [1] * 6
            rank.assert_consistent()


async def test_a_stream_yields_each_layer_as_it_lands() -> None:
    """When a layer is yielded, it is new on this rank; the order is that of the layers."""
    old, new = two_placements(TOPOLOGY, num_layers=4, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:
        seen = []

        async def follow() -> None:
            async for committed in ranks[0].updater.stream(new):
                row = ranks[0].updater.expert_map.physical_to_logical_map[committed.layer]
                assert row.tolist() == new.physical_to_logical_map[committed.layer].tolist()
                seen.append(committed.layer)

        await together([follow, *(partial(rank.updater.update, new) for rank in ranks[1:])])
        assert seen == [0, 1, 2, 3]


async def test_leaving_a_stream_early_ends_the_update_on_all_ranks() -> None:
    """A reader that stops has cancelled, and all ranks end at the same layer."""
    old, new = two_placements(TOPOLOGY, num_layers=9, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:

        async def read_one() -> None:
            async with aclosing(ranks[0].updater.stream(new)) as stream:
                async for _ in stream:
                    break

        outcomes = await together([read_one, *(partial(rank.updater.update, new) for rank in ranks[1:])])
        assert all(isinstance(outcome, UpdateCancelled) for outcome in outcomes[1:])
        assert len({rank.updater.placement for rank in ranks}) == 1
        assert ranks[0].updater.placement != new
        for rank in ranks:
            rank.assert_consistent()


async def test_unchanged_layers_cost_nothing() -> None:
    """Only layers that differ are planned, staged and published."""
    old, new = two_placements(TOPOLOGY, num_layers=5, num_experts=8)
    new = old.with_layers(new, (3,))
    async with memory_world(old, TOPOLOGY) as ranks:
        (summary, *_) = await update_all(ranks, new)
        assert summary.layers == (3,)  # type: ignore[attr-defined]
        assert ranks[0].updater.expert_map.layer_generation.tolist() == [0, 0, 0, 1, 0]


async def test_an_update_to_the_same_placement_is_done_at_once() -> None:
    """Nothing changes, nothing is published."""
    old, _ = two_placements(TOPOLOGY, num_layers=2, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:
        (summary, *_) = await update_all(ranks, old)
        assert summary.layers == ()  # type: ignore[attr-defined]
        assert ranks[0].updater.expert_map.layer_generation.tolist() == [0, 0]


async def test_only_the_layers_asked_for_are_updated() -> None:
    """Other rows keep the old placement."""
    old, new = two_placements(TOPOLOGY, num_layers=4, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:
        await update_all(ranks, new, layers=[1, 2])
        assert ranks[0].updater.placement == old.with_layers(new, (1, 2))
        for rank in ranks:
            rank.assert_consistent()


async def test_the_summary_counts_what_moved() -> None:
    """Bytes sent equal bytes received equal those of the plans."""
    old, new = two_placements(TOPOLOGY, num_layers=6, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:
        summaries: list[Any] = await update_all(ranks, new)
    received = {
        source: sum(s.nbytes_by_source.get(source, 0) for s in summaries)
        for source in (SlotSource.SAME_NODE, SlotSource.CROSS_NODE)
    }
    assert sum(s.sent_nbytes_within_node for s in summaries) == received[SlotSource.SAME_NODE] > 0
    assert sum(s.sent_nbytes_across_nodes for s in summaries) == received[SlotSource.CROSS_NODE] > 0
    assert sum(s.received_nbytes_across_nodes for s in summaries) == received[SlotSource.CROSS_NODE]
    assert received[SlotSource.SAME_NODE] % TINY.expert_nbytes() == 0


async def test_two_updaters_do_not_disturb_each_other() -> None:
    """A main and a draft model update at the same time in one process."""
    main, draft = (two_placements(TOPOLOGY, 4, 8, seed) for seed in (1, 2))
    async with memory_world(main[0], TOPOLOGY) as mains, memory_world(draft[0], TOPOLOGY) as drafts:
        await on_all([*mains, *drafts], ExpertUpdater.update, [main[1]] * len(mains) + [draft[1]] * len(drafts))
        for rank in (*mains, *drafts):
            rank.assert_consistent()
        assert mains[0].updater.placement == main[1]
        assert drafts[0].updater.placement == draft[1]


def refused(placement: ExpertPlacement) -> list[tuple[ExpertPlacement, type[EplbError]]]:
    table = placement.physical_to_logical_map
    return [
        (ExpertPlacement.from_mapping(table[:1], 8), LayerCountMismatch),
        (ExpertPlacement.from_mapping(table[:, :8], 8), InvalidPlacement),
        (ExpertPlacement.from_mapping(table, 9), InvalidPlacement),
        (ExpertPlacement.from_mapping(table * 0, 8), UnplacedExpert),
    ]


@pytest.mark.parametrize("case", range(4))
async def test_placements_that_do_not_fit_are_refused(case: int) -> None:
    """The error comes before a byte moves, nothing has changed, and the updater goes on."""
    old, new = two_placements(TOPOLOGY, num_layers=2, num_experts=8)
    async with memory_world(old, TOPOLOGY) as ranks:
        bad, error = refused(new)[case]
        for rank in ranks:
            with pytest.raises(error):
                await rank.updater.update(bad)
            assert rank.updater.placement == old
            rank.assert_consistent()
        await update_all(ranks, new)
        assert ranks[0].updater.placement == new


async def test_a_layer_without_weights_is_refused() -> None:
    """The error names the layer."""
    alone = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
    old, new = (ExpertPlacement.from_mapping([[0, 1, 2, 3], row]) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))
    (transport,) = MemoryTransport.world(1)
    weights = ExpertWeights(float_weights(num_slots=4))
    async with ExpertUpdater(weights, old, alone, rank=0, transport=transport) as updater:
        with pytest.raises(MissingWeights) as caught:
            await updater.update(new)
        assert caught.value.layer == 1
        with pytest.raises(MissingWeights, match="not rows"):
            await updater.update(new, layers=[5])


async def test_ranks_that_disagree_change_nothing() -> None:
    """Every rank learns which ranks began with another placement; afterwards they can agree."""
    old, new = two_placements(TOPOLOGY, num_layers=2, num_experts=8)
    other = old.with_layers(new, (0,))
    async with memory_world(old, TOPOLOGY) as ranks:
        outcomes = await on_all(ranks, ExpertUpdater.update, [new, new, other, new])
        assert all(isinstance(outcome, PlacementDisagreement) for outcome in outcomes)
        assert {outcome.ranks for outcome in outcomes} == {(2,)}
        assert {rank.updater.placement for rank in ranks} == {old}
        await update_all(ranks, new)
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_a_second_update_while_one_runs_is_refused() -> None:
    """The first is not disturbed."""
    old, new = two_placements(SMALL, num_layers=3, num_experts=4)
    async with memory_world(old, SMALL) as ranks:

        async def second() -> None:
            await anyio.lowlevel.checkpoint()
            with pytest.raises(BusyUpdater):
                await ranks[0].updater.update(new)

        await together([*(partial(rank.updater.update, new) for rank in ranks), second])
        assert ranks[0].updater.placement == new


async def test_use_outside_its_lifetime_is_refused() -> None:
    """Before it is entered and after it is left, an updater raises that it is closed."""
    old, new = two_placements(SMALL, num_layers=1, num_experts=4)
    (transport,) = MemoryTransport.world(1)
    alone = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
    updater = ExpertUpdater(ExpertWeights(TINY.weights(old, alone, 0)), old, alone, rank=0, transport=transport)
    with pytest.raises(ClosedUpdater):
        await updater.update(new)
    async with updater:
        pass
    with pytest.raises(ClosedUpdater):
        await updater.update(new)
    again = ExpertUpdater(ExpertWeights(TINY.weights(old, alone, 0)), old, alone, rank=0, transport=transport)
    with pytest.raises(BusyTransport):
        await again.__aenter__()


async def test_misfits_are_refused_at_construction() -> None:
    """Ranks, slots and rows must fit before anything is connected."""
    placement = ExpertPlacement.trivial(1, 4, 4)
    transport = MemoryTransport.world(2)[0]
    weights = ExpertWeights(float_weights())

    def build(
        weights: ExpertWeights = weights, topology: EPTopology = SMALL, rank: int = 0, **options: int
    ) -> ExpertUpdater:
        return ExpertUpdater(
            weights,
            placement,
            topology,
            rank=rank,
            transport=transport,
            options=UpdateOptions(**options),  # type: ignore[arg-type]
        )

    with pytest.raises(RankMismatch):
        build(topology=EPTopology(4, 1, 1))
    with pytest.raises(RankMismatch):
        build(rank=1)
    with pytest.raises(SlotCountMismatch):
        build(weights=ExpertWeights(float_weights(num_slots=3)))
    with pytest.raises(InvalidPlacement):
        build(weights=ExpertWeights(float_weights(rows=2)))
    with pytest.raises(InvalidPlacement):
        build(topology=EPTopology(2, 1, 3))
    with pytest.raises(InvalidOptions):
        build(staging_depth=0)
    with pytest.raises(InvalidOptions):
        build(transfer_timeout_s=100)


async def test_a_corrupt_byte_is_found_before_it_is_committed() -> None:
    """The receiving rank's error names the slot; layers before it are new on all ranks, and the next update works."""
    old = ExpertPlacement.from_mapping([[0, 1, 2, 3]] * 3)
    new = ExpertPlacement.from_mapping([[2, 1, 0, 3]] * 3)
    schedule = MemorySchedule(faults=(Fault(FaultKind.CORRUPT, src_rank=0, dst_rank=1, row=1, tag=0),))
    async with memory_world(old, SMALL, schedule=schedule, options=UpdateOptions(verify="checksum")) as ranks:
        outcomes: list[Any] = await update_all(ranks, new)
        assert isinstance(outcomes[1], ChecksumMismatch)
        assert (outcomes[1].layer, outcomes[1].slots) == (1, (0,))
        assert isinstance(outcomes[0], UpdateAborted | BrokenTransport)
        assert outcomes[0].committed_layers == outcomes[1].committed_layers == (0,)
        for rank in ranks:
            assert rank.updater.placement == old.with_layers(new, (0,))
            rank.assert_consistent()
        await update_all(ranks, new)
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_a_lost_message_ends_in_a_timeout() -> None:
    """Weights stay consistent and the error names the layer that was waited for."""
    old = ExpertPlacement.from_mapping([[0, 1, 2, 3]] * 3)
    new = ExpertPlacement.from_mapping([[2, 1, 0, 3]] * 3)
    schedule = MemorySchedule(faults=(Fault(FaultKind.DROP, src_rank=0, dst_rank=1, row=2),))
    options = UpdateOptions(transfer_timeout_s=0.05, control_timeout_s=5)
    async with memory_world(old, SMALL, schedule=schedule, options=options) as ranks:
        outcomes: list[Any] = await update_all(ranks, new)
        assert any(isinstance(outcome, TransferTimeout) and outcome.layer == 2 for outcome in outcomes)
        assert {outcome.committed_layers for outcome in outcomes} == {(0, 1)}
        for rank in ranks:
            rank.assert_consistent()


async def test_a_commit_that_goes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary is compared once more in the live weights."""
    old, new = two_placements(SMALL, num_layers=1, num_experts=4)
    monkeypatch.setattr("async_eplb.commit.committer.CopyCommit.run", lambda _self: 0)
    async with memory_world(old, SMALL, options=UpdateOptions(verify="canary")) as ranks:
        outcomes = await update_all(ranks, new)
        assert any("live slots" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_blocking_call_on_the_event_loop_fails() -> None:
    """The guard that all async tests run under notices work that should be in a thread."""
    with pytest.raises(BlockingError):
        await ScheduledWorkers().run("plan", lambda: time.sleep(0.001))


async def test_slow_planning_does_not_block_the_loop() -> None:
    """While a layer is being planned in its thread, other tasks run."""
    old, new = two_placements(SMALL, num_layers=2, num_experts=4)
    async with memory_world(old, SMALL, workers=ThreadWorkers) as ranks:
        stages = ranks[0].updater
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while stages.placement != new:
                await anyio.sleep(0.001)
                ticks += 1

        await together([*(partial(rank.updater.update, new) for rank in ranks), tick])
        assert ticks > 0


async def test_committed_layers_count_once() -> None:
    """While an update runs, between two, and after the second one."""
    old, new = two_placements(TOPOLOGY, num_layers=4, num_experts=8)
    seen: list[int] = []
    async with memory_world(old, TOPOLOGY) as ranks:
        first = ranks[0].updater

        async def watch(target: ExpertPlacement) -> None:
            seen.extend([first.statistics().num_layers_committed async for _ in first.stream(target)])

        for target in (new, old):
            await together([partial(watch, target), *(partial(rank.updater.update, target) for rank in ranks[1:])])
            seen.append(first.statistics().num_layers_committed)
    assert seen == sorted(seen)
    assert (seen[4], seen[-1]) == (4, 8)
