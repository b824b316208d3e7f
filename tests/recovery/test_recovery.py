"""Survivors agree again: the layer in doubt is rolled forward, lost experts are found or loaded, and updates go on."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from anyio import fail_after
from safetensors.torch import save_file
from support.helpers import TINY, assert_same_layer, in_virtual_time, memory_world, on_all, two_placements

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, LayerCommit, Recovery, UpdateOptions
from async_eplb.device import CpuDevice
from async_eplb.errors import (
    BrokenControlGroup,
    BusyUpdater,
    ClosedUpdater,
    CommitFailed,
    DeadRankPlaced,
    InvalidOptions,
    InvalidWeightSource,
    RankMismatch,
    TransferTimeout,
    Unrecoverable,
)
from async_eplb.recovery.survivors import homes, on_survivors, without_ranks
from async_eplb.recovery.weight_source import INDEX, SafetensorsSource, WeightSource
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import Fault, FaultKind, LaunchRule, MemorySchedule, MemoryTransport
from async_eplb.transport.one_round import hold_round
from async_eplb.transport.renumbered import RenumberedControlGroup

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
OPTIONS = UpdateOptions(transfer_timeout_s=0.2, control_timeout_s=0.4)


class TinySource:
    """Holds the tiny model, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def load(self, layer: int, logical_expert: int) -> Any:
        """Return an expert's bytes."""
        self.asked.append((layer, logical_expert))
        return TINY.expert_bytes(layer, logical_expert)


async def recover(
    ranks: list[Any],
    sources: Sequence[WeightSource | None] | None = None,
    transports: Sequence[MemoryTransport] | None = None,
) -> list[Recovery]:
    """Recover all of these ranks."""
    transports = transports or MemoryTransport.world(len(ranks))
    chosen = sources or [None] * len(ranks)
    outcomes = await on_all(ranks, lambda u, t, s: u.recover(t, source=s), transports, chosen)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


@in_virtual_time
async def test_one_rank_did_not_hear_of_a_commit() -> None:
    """It must not serve; recover() commits the layer there from kept staging, on no other rank."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    rolled = []
    for lost in range(2, 12):
        schedule = MemorySchedule(lost_results=frozenset({(1, lost)}), control_s=0.01)
        async with memory_world(old, TOPOLOGY, schedule=schedule, options=OPTIONS) as ranks:
            with fail_after(5):
                await on_all(ranks, lambda u: u.update(new))
            recoveries = await recover(ranks)
            rolled.append([recovery.rolled_forward for recovery in recoveries])
            assert_same_layer(ranks, old)
            await on_all(ranks, lambda u: u.update(new))
            assert assert_same_layer(ranks, old) == 3
    assert any(layers[1] and not layers[0] for layers in rolled)
    assert not any(layers[0] and not layers[1] for layers in rolled)


@in_virtual_time
async def test_a_copy_fails_on_one_rank_only() -> None:
    """The others have the layer; that rank holds until it has copied it anew, and then its hook is told."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    told: list[list[LayerCommit]] = [[], [], []]
    schedule, hooks = MemorySchedule(control_s=0.01), [each.append for each in told]
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=schedule, on_commit=hooks) as ranks:
        updater = ranks[1].updater
        publish, failures = updater.expert_map.publish, [OSError("no luck")]

        def fail_once(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            publish(*arguments)

        updater.expert_map.publish = fail_once  # type: ignore[method-assign, assignment]
        outcomes = await on_all(ranks, lambda u: u.update(new))
        assert isinstance(outcomes[1], CommitFailed)
        assert (outcomes[1].committed_layers, outcomes[1].layer) == ((), 0)
        committed = outcomes[0].committed_layers
        assert committed[0] == 0
        with pytest.raises(CommitFailed):
            await updater.step()
        assert told[1] == []
        assert [recovery.rolled_forward for recovery in await recover(ranks)] == [(), committed, ()]
        for commits in told:
            assert tuple(commit.layer for commit in commits) == committed
            assert {commit.step for commit in commits} == {0}
            for commit in commits:
                row = new.physical_to_logical_map[commit.layer]
                assert commit.maps.physical_to_logical_map.tolist() == row.tolist()
        assert assert_same_layer(ranks, old) == len(committed)
        await updater.step()


@in_virtual_time
async def test_experts_of_a_lost_rank_are_loaded() -> None:
    """Only those that nobody holds, each once, into slots that can be spared."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    lost = without_ranks(old, TOPOLOGY, [2]).unplaced()
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        sources = [TinySource(), TinySource()]
        first, second = await recover(ranks[:2], list(sources))
        assert first.lost == second.lost == lost
        assert lost
        assert first.missing == {}
        assert first.ranks == (0, 1)
        asked = sorted(sources[0].asked + sources[1].asked)
        assert asked == [(layer, expert) for layer, experts in lost.items() for expert in experts]
        assert_same_layer(ranks[:2], first.placement)
        with pytest.raises(DeadRankPlaced):
            await ranks[0].updater.update(new)
        drawn = on_survivors(ExpertPlacement.trivial(3, 6, 6), TOPOLOGY, [0, 1])
        await on_all(ranks[:2], lambda u: u.update(drawn))
        for rank in ranks[:2]:
            rank.assert_consistent()
            assert rank.updater.placement == drawn


@in_virtual_time
async def test_without_a_source_lost_experts_are_reported() -> None:
    """All ranks report the same, and go on with the experts that remain."""
    old, _ = two_placements(TOPOLOGY, 3, num_experts=6)
    lost = without_ranks(old, TOPOLOGY, [2]).unplaced()
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        recoveries = await recover(ranks[:2], [TinySource(), None])
        assert [recovery.missing for recovery in recoveries] == [lost, lost]
        for rank in ranks[:2]:
            rank.assert_consistent()


@in_virtual_time
async def test_recovering_at_the_wrong_time() -> None:
    """A transport in another order, an idle rank, an updater that was left, a survivor that does not come."""
    old, _ = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        async with ranks[0].updater.idle():
            with pytest.raises(BusyUpdater):
                await ranks[0].updater.recover(MemoryTransport.world(1)[0])
        with pytest.raises(RankMismatch):
            await recover([ranks[1], ranks[0]])
        with pytest.raises(BrokenControlGroup):
            await ranks[0].updater.recover(MemoryTransport.world(2)[0])
        await recover(ranks)
        assert_same_layer(ranks, old)
    with pytest.raises(ClosedUpdater):
        await ranks[0].updater.recover(MemoryTransport.world(1)[0])


@in_virtual_time
async def test_a_rank_that_missed_an_update_cannot_be_brought_along() -> None:
    """All ranks raise the same error, which names it; what each of them serves stays as it is."""
    old, _ = two_placements(TOPOLOGY, 3, num_experts=6)
    new = on_survivors(ExpertPlacement.trivial(3, 6, 6), TOPOLOGY, [0, 1])
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        await recover(ranks[:2], [TinySource(), TinySource()])
        summaries = await on_all(ranks[:2], lambda u: u.update(new))
        errors = await on_all(ranks, ExpertUpdater.recover, MemoryTransport.world(3))
        assert [(type(error), error.ranks) for error in errors] == [(Unrecoverable, (2,))] * 3
        assert [error.layers for error in errors] == [(), (), summaries[0].layers]
        assert [rank.updater.placement for rank in ranks] == [new, new, old]
        for rank in ranks:
            rank.assert_consistent()


@pytest.mark.parametrize("launch_rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED])
@in_virtual_time
async def test_survivors_get_experts_from_each_other(launch_rule: LaunchRule) -> None:
    """Whether peers send them or are read, and whatever places survivors have in their own transport."""
    old, _ = two_placements(TOPOLOGY, 3, num_experts=6)
    first, second = (
        on_survivors(ExpertPlacement.from_mapping([row] * 3), TOPOLOGY, [0, 2])
        for row in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2])
    )
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        remaining = [ranks[0], ranks[2]]
        schedule = MemorySchedule(control_s=0.01, launch_rule=launch_rule)
        await recover(remaining, [TinySource(), TinySource()], MemoryTransport.world(2, schedule))
        for placement in (first, second):
            await on_all(remaining, partial(ExpertUpdater.update, new_placement=placement))
            for rank in remaining:
                rank.assert_consistent()
                assert rank.updater.placement == placement


@in_virtual_time
async def test_errors_after_a_recovery_name_ranks_of_the_whole_group() -> None:
    """Not places in the transport of those that remain."""
    old, _ = two_placements(TOPOLOGY, 3, num_experts=6)
    new = on_survivors(ExpertPlacement.trivial(3, 6, 6), TOPOLOGY, [0, 2])
    async with memory_world(old, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
        remaining = [ranks[0], ranks[2]]
        dropped, deaf = Fault(FaultKind.DROP, 0, 1, 0), frozenset({(1, 7)})
        for schedule, kind in (
            (MemorySchedule(control_s=0.01, faults=(dropped,)), TransferTimeout),
            (MemorySchedule(control_s=0.01, lost_results=deaf), BrokenControlGroup),
        ):
            await recover(remaining, [TinySource(), TinySource()], MemoryTransport.world(2, schedule))
            _, error = await on_all(remaining, lambda u: u.update(new))
            assert isinstance(error, kind)
            assert error.rank == 2
            assert "ranks [0, 2]" in str(error)
        alone = MemoryTransport.world(2)[1]
        weights = ExpertWeights(remaining[1].tensors)
        control = await alone.open(CpuDevice(), ScheduledWorkers(), weights, control_timeout_s=0.4)
        with pytest.raises(BrokenControlGroup, match=r"ranks \[0, 2\]") as caught:
            await hold_round(RenumberedControlGroup(control, (0, 2)), [1])
        assert (caught.value.rank, caught.value.missing) == (2, (0,))


def test_homes_are_spread() -> None:
    """Empty slots first, then what has the most replicas; every lost expert that fits."""
    placement = ExpertPlacement.from_mapping([[0, 0, 1, 1, 1, -1, 2, 3, 4]], num_logical_experts=5)
    left = without_ranks(placement, TOPOLOGY, [2])
    assert [(home.logical_expert, home.physical_expert) for home in homes(left, TOPOLOGY, [2])] == [
        (2, 5),
        (3, 2),
        (4, 0),
    ]


def test_members_are_ranks_of_the_group() -> None:
    """In any order and of any type of integers."""
    alone = ExpertPlacement.from_mapping([[0, 1, 2, 3, 4, 5]])
    for members in ([0, 2], (2, 0), {0, 2}, torch.tensor([2, 0])):
        spread = on_survivors(alone, TOPOLOGY, members)
        assert spread.physical_to_logical_map.tolist() == [[0, 1, 2, -1, -1, -1, 3, 4, 5]]
    for wrong in ([0, 3], [-1, 0], ["0", "2"], [0.0, 2.0], 2, None):
        with pytest.raises(InvalidOptions, match=r"^members is"):
            on_survivors(alone, TOPOLOGY, wrong)  # type: ignore[arg-type]


def test_safetensors_are_read_by_pattern(tmp_path: Path) -> None:
    """One expert's tensors, concatenated where a slot fuses them, out of the file that the index names."""
    gate, up, down = torch.full((2, 3), 1.0), torch.full((2, 3), 2.0), torch.full((3, 2), 3.0)
    name = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    files = {
        "a.safetensors": {name.format(4, 7, "gate"): gate, name.format(4, 7, "up"): up},
        "b.safetensors": {name.format(4, 7, "down"): down},
    }
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    prefix = "model.layers.{layer}.mlp.experts.{expert}."
    patterns = [[prefix + "gate_proj.weight", prefix + "up_proj.weight"], prefix + "down_proj.weight"]
    source = SafetensorsSource(tmp_path, patterns, first_layer=3)
    w13, w2 = source.load(1, 7)
    assert torch.equal(w13, torch.cat([gate, up]))
    assert torch.equal(w2, down)
    with pytest.raises(InvalidWeightSource, match="logical expert 8"):
        source.load(1, 8)
    (tmp_path / "b.safetensors").unlink()
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidWeightSource, match="down_proj"):
        SafetensorsSource(tmp_path, patterns, first_layer=3).load(1, 7)
    with pytest.raises(InvalidWeightSource, match="no safetensors"):
        SafetensorsSource(tmp_path / "nothing", patterns)


PATTERN = "{layer}.{expert}"


@pytest.mark.parametrize(
    "patterns",
    [
        *(["{layer}.{proj}.{expert}"], ["{}"], ["{0}.{expert}"], ["{layer}.{expert"], ["{layer}}.{expert}"]),
        *(["{layer.name}.{expert}"], ["{layer[0]}.{expert}"], ["{layer:s}.{expert}"], ["{layer!x}.{expert}"]),
        *([[PATTERN, "{proj}"]], [PATTERN, ["{layer}."]], ["w"], [None], [[None]], [b"{expert}"], [1], None, 1),
        *([], [[]], [PATTERN, []], PATTERN),
    ],
    ids=repr,
)
def test_other_patterns_are_refused_when_they_are_given(tmp_path: Path, patterns: Any) -> None:
    """Not when a rank has been lost."""
    save_file({"0.0": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidOptions, match=r"^patterns is .*\{layer\} and \{expert\}") as caught:
        SafetensorsSource(tmp_path, patterns)
    assert caught.value.option == "patterns"


@pytest.mark.parametrize(
    "pattern", ["{layer:02d}.{expert}", "{{{layer}}}.{expert}", "{expert}", "{layer!r}-{expert:>3}"]
)
def test_patterns_are_those_of_python(tmp_path: Path, pattern: str) -> None:
    """Widths, braces of the name itself, and models of one layer."""
    save_file({pattern.format(layer=0, expert=1): torch.ones(2)}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path, [pattern]).load(0, 1)[0].tolist() == [1, 1]


@pytest.mark.parametrize("first_layer", ["3", 3.0, None, -1])
def test_the_first_layer_is_a_whole_number(tmp_path: Path, first_layer: Any) -> None:
    """Of any type."""
    save_file({"4.0": torch.ones(2)}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path, [PATTERN], first_layer=torch.tensor(3)).load(1, 0)[0].tolist() == [1, 1]  # type: ignore[arg-type]
    with pytest.raises(InvalidOptions, match=r"^first_layer is"):
        SafetensorsSource(tmp_path, [PATTERN], first_layer=first_layer)


def test_an_expert_is_cut_out_of_a_tensor_of_all(tmp_path: Path) -> None:
    """``convert`` is told which, beside tensors that have one expert each."""
    fused, scales = torch.arange(24.0).view(4, 3, 2), torch.arange(4.0)
    save_file({"5.w": fused, **{f"5.{e}.s": scales[e : e + 1].clone() for e in range(4)}}, tmp_path / "m.safetensors")

    def convert(number: int, tensor: torch.Tensor, expert: int) -> torch.Tensor:
        return tensor[expert].T if number == 0 else tensor

    source = SafetensorsSource(tmp_path, ["{layer}.w", "{layer}.{expert}.s"], first_layer=5, convert=convert)
    for expert in range(4):
        weight, scale = source.load(0, expert)
        assert torch.equal(weight, fused[expert].T)
        assert scale.tolist() == [expert]


def test_a_tensor_in_two_files_is_told(tmp_path: Path) -> None:
    """With both files, unless an index says which; an index that says both is told, too."""
    for number, file in enumerate(("a.safetensors", "b.safetensors")):
        save_file({"0.0": torch.full((2,), number), f"0.{number + 1}": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(InvalidWeightSource, match=r"'0\.0' is in .*a\.safetensors and in .*b\.safetensors"):
        SafetensorsSource(tmp_path, [PATTERN])
    (tmp_path / INDEX).write_text('{"metadata": {"size": NaN}, "weight_map": {"0.0": "b.safetensors"}}')
    assert SafetensorsSource(tmp_path, [PATTERN]).load(0, 0)[0].tolist() == [1, 1]
    (tmp_path / INDEX).write_text('{"weight_map": {"0.0": "b.safetensors", "0.0": "a.safetensors"}}')
    with pytest.raises(InvalidWeightSource, match=r"'0\.0' is in b\.safetensors and in a\.safetensors"):
        SafetensorsSource(tmp_path, [PATTERN])
