"""Policies: DeepSeek's algorithm against the published example and a slow reference, and the incremental policy."""

import json
import math
from importlib.resources import files
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.updates import examples

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import (
    InvalidLoad,
    InvalidOptions,
    InvalidPlacement,
    InvalidPolicyOutput,
    TooFewSlots,
    UnplacedExpert,
)
from async_eplb.load.value import ExpertLoad
from async_eplb.plan import plan_layer
from async_eplb.policy import (
    Global,
    Hierarchical,
    Incremental,
    PlacementPolicy,
    activated_experts,
    balancedness,
    rank_costs,
    receives,
    require_policy_output,
    tokens,
)
from async_eplb.policy.objective import FloatArray
from async_eplb.policy.packing import place_groups
from async_eplb.testing.sample_model import random_placement

NODES_OF_EIGHT = EPTopology(num_ranks=32, num_nodes=4, num_local_physical_experts=9)
SMALL = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)


def reference(load: list[list[float]], num_groups: int, topology: EPTopology) -> list[list[int]]:
    """Place experts as DeepSeek describes, one layer and one expert at a time, in single precision."""
    nodes = topology.num_nodes
    if num_groups % nodes:
        num_groups = nodes = 1
    return [_reference_layer([np.float32(tokens) for tokens in row], num_groups, nodes, topology) for row in load]


def _reference_layer(load: list[np.float32], num_groups: int, nodes: int, topology: EPTopology) -> list[int]:
    size = len(load) // num_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
    sums = [np.float32(math.fsum(load[expert] for expert in group)) for group in groups]
    row: list[int] = []
    for node in _fill(sums, nodes):
        experts = [expert for group in node for expert in groups[group]]
        counts = [1] * len(experts)
        replicas = list(range(len(experts)))
        while len(replicas) < topology.num_physical_experts // nodes:
            shares = [load[expert] / np.float32(count) for expert, count in zip(experts, counts, strict=True)]
            hottest = shares.index(max(shares))
            counts[hottest] += 1
            replicas.append(hottest)
        shares = [load[experts[replica]] / np.float32(counts[replica]) for replica in replicas]
        for rank in _fill(shares, topology.num_ranks // nodes):
            row += [experts[replicas[item]] for item in rank]
    return row


def _fill(weights: list[np.float32], num_packs: int) -> list[list[int]]:
    """Put each item, the heaviest first, into the lightest pack with room."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    if num_packs == len(weights):
        return [[item] for item in range(num_packs)]
    sums = [np.float32(0)] * num_packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        roomy = [pack for pack in range(num_packs) if len(packs[pack]) < len(weights) // num_packs]
        lightest = min(roomy, key=lambda pack: sums[pack])
        packs[lightest].append(item)
        sums[lightest] += weights[item]
    return packs


@st.composite
def problems(draw: st.DrawFn) -> tuple[ExpertLoad, EPTopology, int]:
    """Draw a load with many ties, a topology with room for its experts, and groups that divide them."""
    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    ranks = nodes * ranks_per_node
    slots = -(-groups * size // ranks) + draw(st.integers(0, 2))
    counts = draw(st.sampled_from([st.integers(0, 9), st.integers(0, 2**40), st.floats(0, 1e4, width=32)]))
    row = st.lists(counts, min_size=groups * size, max_size=groups * size)
    load = ExpertLoad.from_counts(draw(st.lists(row, min_size=1, max_size=3)))
    return load, EPTopology(ranks, nodes, slots), groups


@st.composite
def drifts(draw: st.DrawFn) -> tuple[ExpertLoad, ExpertPlacement, EPTopology]:
    """Draw a load and any complete placement, empty slots included."""
    load, topology, _ = draw(problems())
    spare = topology.num_physical_experts - load.num_logical_experts
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    empty = draw(st.integers(0, spare))
    placed = (load.num_layers, topology.num_physical_experts, load.num_logical_experts)
    return load, random_placement(rng, *placed, num_empty=empty), topology


def lognormal_drift(seed: int, sigma: float, num_layers: int = 12) -> tuple[ExpertLoad, ExpertLoad]:
    """Return gamma-distributed tokens of 256 experts, and what they have become."""
    rng = np.random.default_rng(seed)
    before = 1000 * rng.gamma(1.0, size=(num_layers, 256))
    after = before * np.exp(sigma * rng.standard_normal(before.shape))
    return ExpertLoad.from_counts(before), ExpertLoad.from_counts(after)


def peaks(load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology) -> FloatArray:
    """Return the cost of the most loaded rank of each layer."""
    return np.asarray(rank_costs(load, placement, topology).max(axis=1))


def nodes_of(placement: ExpertPlacement) -> list[list[list[int]]]:
    """Return the experts of each node of :data:`NODES_OF_EIGHT`, layer by layer."""
    nodes: list[list[list[int]]] = placement.physical_to_logical_map.reshape(-1, 4, 72).tolist()
    return nodes


def test_the_published_example() -> None:
    """Exactly the placement that DeepSeek prints for its example."""
    example = json.loads(files("async_eplb").joinpath("data/deepseek_example.json").read_text())
    topology = EPTopology(example["num_gpus"], example["num_nodes"], 2)
    load = ExpertLoad.from_counts(example["logical_load"])
    placement = Hierarchical(example["num_groups"]).place(load, topology)
    assert placement.physical_to_logical_map.tolist() == example["physical_to_logical_map"]


@examples
@given(problems())
def test_hierarchical_equals_the_slow_reference(case: tuple[ExpertLoad, EPTopology, int]) -> None:
    """Slot by slot, ties included, also where groups do not divide over the nodes."""
    load, topology, groups = case
    placement = Hierarchical(groups).place(load, topology)
    assert placement.physical_to_logical_map.tolist() == reference(load.tokens.tolist(), groups, topology)


@examples
@given(problems())
def test_global_equals_the_slow_reference(case: tuple[ExpertLoad, EPTopology, int]) -> None:
    """One group and one node."""
    load, topology, _ = case
    one_node = EPTopology(topology.num_ranks, 1, topology.num_local_physical_experts)
    placement = Global().place(load, topology)
    assert placement.physical_to_logical_map.tolist() == reference(load.tokens.tolist(), 1, one_node)


def test_hierarchical_equals_the_slow_reference_at_full_size() -> None:
    """Two layers of 256 experts on 32 ranks."""
    load, _ = lognormal_drift(0, 0.0, num_layers=2)
    for groups in (1, 8):
        placement = Hierarchical(groups).place(load, NODES_OF_EIGHT)
        assert placement.physical_to_logical_map.tolist() == reference(load.tokens.tolist(), groups, NODES_OF_EIGHT)


@examples
@given(problems())
def test_hierarchical_keeps_groups_on_nodes(case: tuple[ExpertLoad, EPTopology, int]) -> None:
    """Every replica of a group's experts is on one node, and every expert has one."""
    load, topology, groups = case
    placement = Hierarchical(groups).place(load, topology)
    assert (placement.replica_counts() >= 1).all()
    if groups % topology.num_nodes == 0:
        nodes = placement.physical_to_logical_map.reshape(load.num_layers, topology.num_nodes, -1)
        on_node = [{e // (load.num_logical_experts // groups) for e in node} for row in nodes for node in row.tolist()]
        assert sum(len(node) for node in on_node) == load.num_layers * groups


@examples
@given(drifts(), st.none() | st.integers(0, 9), st.sampled_from([tokens, activated_experts]))
def test_incremental_is_never_worse(
    case: tuple[ExpertLoad, ExpertPlacement, EPTopology], max_moves: int | None, objective: object
) -> None:
    """No peak rises, no expert is lost, moves stay within their limit, and equal calls give equal results."""
    load, current, topology = case
    policy = Incremental(max_moves_per_layer=max_moves, objective=objective)  # type: ignore[arg-type]
    new = require_policy_output(policy, policy(load, current, topology), current, topology)
    before, after = (rank_costs(load, p, topology, policy.objective).max(axis=1) for p in (current, new))
    assert (after <= before * (1 + 2e-6)).all()
    if max_moves is not None:
        assert (receives(current, new, topology).sum(axis=1) <= max_moves).all()
    assert policy(load, current, topology) == new


@examples
@given(problems(), st.none() | st.integers(0, 20), st.randoms(use_true_random=False))
def test_incremental_keeps_groups_together(
    case: tuple[ExpertLoad, EPTopology, int], max_moves: int | None, random: Random
) -> None:
    """Whatever the load has become, each group is on one node, no peak rises, and moves stay within their limit."""
    load, topology, groups = case
    current = Hierarchical(groups).place(load, topology)
    rows = load.tokens.tolist()
    for row in rows:
        random.shuffle(row)
    drifted = ExpertLoad.from_counts(rows)
    policy = Incremental(max_moves, num_groups=groups, regroup_above=1)
    new = require_policy_output(policy, policy(drifted, current, topology), current, topology)
    if groups % topology.num_nodes == 0:
        nodes = new.physical_to_logical_map.reshape(load.num_layers * topology.num_nodes, -1)
        on_node = [{e * groups // load.num_logical_experts for e in node if e >= 0} for node in nodes.tolist()]
        assert sum(len(node) for node in on_node) == load.num_layers * groups
    assert (peaks(drifted, new, topology) <= peaks(drifted, current, topology) * (1 + 2e-6)).all()
    if max_moves is not None:
        assert (receives(current, new, topology).sum(axis=1) <= max_moves).all()


@examples
@given(drifts())
def test_receives_are_what_plans_receive(case: tuple[ExpertLoad, ExpertPlacement, EPTopology]) -> None:
    """Rank by rank, as many as the plan of that rank has."""
    load, new, topology = case
    old = ExpertPlacement.trivial(load.num_layers, new.num_physical_experts, new.num_logical_experts)
    maps = zip(old.physical_to_logical_map, new.physical_to_logical_map, strict=True)
    planned = [[len(plan_layer(*rows, topology, rank).recvs) for rank in range(topology.num_ranks)] for rows in maps]
    assert receives(old, new, topology).tolist() == planned


@pytest.mark.parametrize(("sigma", "most_receives"), [(0.1, 0.08), (0.3, 0.12)])
def test_incremental_moves_few_experts(sigma: float, most_receives: float) -> None:
    """After a drift every layer is within 2 % of balance again, for a few receives where a full replan needs 96 %."""
    before, after = lognormal_drift(1, sigma)
    current = Global().place(before, NODES_OF_EIGHT)
    new = Incremental()(after, current, NODES_OF_EIGHT)
    assert (balancedness(after, new, NODES_OF_EIGHT) >= 1 / 1.02).all()
    assert receives(current, new, NODES_OF_EIGHT).sum(axis=1).mean() <= most_receives * 288
    assert receives(current, Global().place(after, NODES_OF_EIGHT), NODES_OF_EIGHT).sum(axis=1).mean() > 0.9 * 288


@pytest.mark.parametrize(
    ("counts", "current", "num_groups", "max_moves"),
    [
        ([4, 13, 0, 15], [1, 0, 0, 3, 2, 2], 4, 8),
        ([16, 19, 8, 1], [1, 3, 3, 0, 2, 2], 4, 8),
        ([11, 14, 1, 12, 12, 12], [3, 2, 2, 1, 0, 5, 4, 4], 6, 2),
    ],
)
def test_a_peak_that_would_rise_stays(counts: list[int], current: list[int], num_groups: int, max_moves: int) -> None:
    """By a tenth, a hundredth or 4e-6, where groups that trade nodes leave a search no better place."""
    placement, topology = ExpertPlacement.from_mapping([current]), EPTopology(2, 2, len(current) // 2)
    policy = Incremental(max_moves, 1, num_groups, activated_experts, regroup_above=1, replan_above=2)
    assert policy(ExpertLoad.from_counts([counts]), placement, topology) == placement


def test_a_peak_that_stays_is_no_reason_to_go_back() -> None:
    """Of two loaded ranks one is relieved, as far as moves go."""
    load = ExpertLoad.from_counts([[10, 10, 10, 10, 1, 1, 1, 1]])
    current, topology = ExpertPlacement.trivial(1, 8, 8), EPTopology(4, 1, 2)
    new = Incremental(2)(load, current, topology)
    assert sorted(rank_costs(load, new, topology)[0].tolist()) == [2, 11, 11, 20]


def test_groups_are_brought_together_though_the_peak_rises() -> None:
    """A layer that does not keep to its groups is replanned, even from perfect balance."""
    load = ExpertLoad.from_counts([[10, 10, 1, 1]])
    current, topology = ExpertPlacement.from_mapping([[0, 2, 1, 3]]), EPTopology(2, 2, 2)
    new = Incremental(num_groups=2)(load, current, topology)
    assert new == Hierarchical(2).place(load, topology)
    assert peaks(load, new, topology) > peaks(load, current, topology)


def test_incremental_keeps_groups_on_their_nodes() -> None:
    """Each node holds the experts it held, as balanced as a replan that keeps them there."""
    before, after = lognormal_drift(2, 0.1)
    current = Hierarchical(8).place(before, NODES_OF_EIGHT)
    new = Incremental(num_groups=8, regroup_above=math.inf)(after, current, NODES_OF_EIGHT)
    old_groups, groups = ([[sorted({e // 32 for e in n}) for n in row] for row in nodes_of(p)] for p in (current, new))
    assert old_groups == groups
    replan = place_groups(after, np.array(groups).reshape(12, 8), NODES_OF_EIGHT)
    limit = np.maximum(peaks(after, replan, NODES_OF_EIGHT), 1.02 * after.tokens.sum(axis=1) / 32)
    assert (peaks(after, new, NODES_OF_EIGHT) <= limit * (1 + 2e-6)).all()
    assert receives(current, new, NODES_OF_EIGHT).sum(axis=1).mean() <= 0.08 * 288


def test_two_groups_swap_nodes_where_that_pays() -> None:
    """Nodes with 40 and 4 tokens get 22 each; without the option, or enough moves, groups stay."""
    load = ExpertLoad.from_counts([[10, 10, 10, 10, 1, 1, 1, 1]])
    current = ExpertPlacement.from_mapping([[0, 1, 1, 2, 3, 0, 4, 5, 4, 6, 7, 5]])
    new = Incremental(num_groups=4)(load, current, SMALL)
    nodes = [{expert // 2 for expert in node} for node in new.physical_to_logical_map.reshape(2, 6).tolist()]
    assert [len(node) for node in nodes] == [2, 2]
    assert rank_costs(load, new, SMALL).tolist() == [[11, 11, 11, 11]]
    for stays in (
        Incremental(num_groups=4, regroup_above=math.inf, replan_above=math.inf),
        Incremental(3, num_groups=4),
    ):
        kept = stays(load, current, SMALL).physical_to_logical_map
        assert set(kept[0, :6].tolist()) == {0, 1, 2, 3}


def test_incremental_leaves_balanced_layers_alone() -> None:
    """Only the layer that is out of balance changes."""
    load = ExpertLoad.from_counts([[1] * 12, [9, 9, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    current = ExpertPlacement.trivial(2, 12, 12)
    assert Incremental()(load, current, SMALL).changed_layers(current) == (1,)


def test_a_chain_of_swaps_pays_each_rank_once() -> None:
    """Two loaded ranks unload to one partner through the same slot: three receives instead of four."""
    topology = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
    load = ExpertLoad.from_counts([[50, 60, 50, 55, 20, 45]])
    current = ExpertPlacement.trivial(1, 6, 6)
    new = Incremental(target=1.1)(load, current, topology)
    assert balancedness(load, new, topology)[0] >= 1 / 1.1
    assert receives(current, new, topology).sum() <= 3


def test_a_hot_expert_is_replicated() -> None:
    """Swaps alone cannot help an expert that is more than one rank's share."""
    load = ExpertLoad.from_counts([[90, 10, 10, 10, 10, 10]])
    current = ExpertPlacement.from_mapping([[0, 1, 2, 2, 3, 4, 5, 5, 1, 3, 4, -1]], 6)
    new = Incremental()(load, current, SMALL)
    assert new.replica_counts()[0, 0] >= 3
    assert peaks(load, new, SMALL)[0] < 50


def test_groups_on_several_nodes_are_brought_together() -> None:
    """A placement that knew no groups is replanned at once."""
    load = ExpertLoad.from_counts([[1] * 8])
    current = ExpertPlacement.trivial(1, 12, 8)
    assert Incremental(num_groups=4)(load, current, SMALL) == Hierarchical(4).place(load, SMALL)
    assert Incremental(1, num_groups=4)(load, current, SMALL) == current


def test_three_groups_of_two_experts_on_two_nodes() -> None:
    """The placement that DeepSeek, vLLM and SGLang compute."""
    load, topology = ExpertLoad.from_counts([[10, 20]]), EPTopology(4, 2, 1)
    assert Hierarchical(3).place(load, topology).physical_to_logical_map.tolist() == [[0, 1, 1, 0]]


@examples
@given(drifts(), st.integers(1, 24))
def test_groups_that_do_not_divide_over_nodes_do_not_bind(
    case: tuple[ExpertLoad, ExpertPlacement, EPTopology], groups: int
) -> None:
    """As in the published algorithm, experts then go anywhere, also if they do not divide over the groups."""
    load, current, topology = case
    policies = Hierarchical(groups), Incremental(num_groups=groups)
    if groups % topology.num_nodes:
        assert policies[0](load, current, topology) == Global()(load, current, topology)
        assert policies[1](load, current, topology) == Incremental()(load, current, topology)
    elif load.num_logical_experts % groups:
        for policy in policies:
            with pytest.raises(InvalidOptions, match="groups do not divide"):
                policy(load, current, topology)


def test_balancedness_of_replicas_spread_evenly() -> None:
    """Mean over maximum: ranks have 6 + 2, 6 + 2 and 8 tokens."""
    topology = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
    load = ExpertLoad.from_counts([[12, 2, 2, 8], [0, 0, 0, 0]], num_steps=2)
    placement = ExpertPlacement.from_mapping([[0, 1, 2, 0, 3, -1], [0, 1, 2, 0, 3, -1]], 4)
    assert rank_costs(load, placement, topology)[0].tolist() == [4, 4, 4]
    assert balancedness(load, placement, topology).tolist() == [1, 1]
    assert balancedness(load, placement, EPTopology(2, 1, 3))[0] == 6 / 7


def test_activated_experts_are_counted_not_their_tokens() -> None:
    """A replica costs the probability that a step reads it: few tokens matter, many hardly more."""
    costs = activated_experts(np.array([0.0, 0.1, 5.0, 500.0]))
    assert costs[0] == 0
    assert costs.tolist() == pytest.approx([0, 1 - math.exp(-0.1), 1 - math.exp(-5), 1])


def test_an_objective_changes_what_is_balanced() -> None:
    """Two busy experts cost the same to read, whatever their tokens; two idle ones next to nothing."""
    topology = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
    load = ExpertLoad.from_counts([[1000, 10, 0, 0]])
    current = ExpertPlacement.from_mapping([[0, 1, 2, 3]], 4)
    new = Incremental(objective=activated_experts)(load, current, topology)
    assert balancedness(load, new, topology, activated_experts)[0] == pytest.approx(1, abs=1e-3)
    assert balancedness(load, current, topology, activated_experts)[0] == pytest.approx(0.5, abs=1e-3)


LOAD = ExpertLoad.from_counts([[1] * 12])
CURRENT = ExpertPlacement.trivial(1, 12, 12)


@pytest.mark.parametrize(
    "options",
    [
        {"max_moves_per_layer": -1},
        {"target": 0.9},
        {"target": float("nan")},
        {"replan_above": 0.5},
        {"regroup_above": 0},
        {"objective": np.cos},
        {"objective": np.sum},
        {"objective": lambda x: -x},
        {"objective": lambda x: x + 1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    """The error names the option."""
    with pytest.raises(InvalidOptions) as caught:
        Incremental(**options)  # type: ignore[arg-type]
    assert caught.value.option in options


@pytest.mark.parametrize("policy", [Hierarchical(2), Global(), Incremental()])
def test_a_load_of_another_model_is_refused(policy: PlacementPolicy) -> None:
    """Layers and experts of load and placement are the same."""
    for counts in ([[1] * 11], [[1] * 12] * 2):
        with pytest.raises(InvalidLoad, match="the load has"):
            policy(ExpertLoad.from_counts(counts), CURRENT, SMALL)


@pytest.mark.parametrize("num_groups", [8, 10, 24])
def test_groups_that_stay_on_nodes_are_equally_large(num_groups: int) -> None:
    """Those that divide over the nodes, and not the experts over them, are refused; no groups are never made."""
    with pytest.raises(InvalidOptions, match="num_groups is 0"):
        Hierarchical(0)
    with pytest.raises(InvalidOptions, match="num_groups is 0"):
        Incremental(num_groups=0)
    for policy in (Hierarchical(num_groups), Incremental(num_groups=num_groups)):
        with pytest.raises(InvalidOptions, match=f"{num_groups} groups do not divide 12"):
            policy(LOAD, CURRENT, SMALL)


def test_fewer_slots_than_experts_are_refused() -> None:
    """Each expert needs a slot."""
    topology = EPTopology(num_ranks=11, num_nodes=1, num_local_physical_experts=1)
    with pytest.raises(TooFewSlots) as caught:
        Global().place(LOAD, topology)
    assert (caught.value.num_physical_experts, caught.value.num_logical_experts) == (11, 12)


def test_incremental_needs_a_complete_placement() -> None:
    """Nothing can be received that nobody holds."""
    current = ExpertPlacement.from_mapping([[0] * 12], 12)
    with pytest.raises(UnplacedExpert):
        Incremental()(LOAD, current, SMALL)
    with pytest.raises(InvalidPlacement):
        Incremental()(LOAD, CURRENT, NODES_OF_EIGHT)


@pytest.mark.parametrize(
    "output",
    [
        None,
        CURRENT.physical_to_logical_map,
        ExpertPlacement.trivial(2, 12, 12),
        ExpertPlacement.trivial(1, 12, 11),
        ExpertPlacement.trivial(1, 24, 12),
        ExpertPlacement.from_mapping([[0] * 12], 12),
    ],
)
def test_an_invalid_output_names_its_policy(output: object) -> None:
    """Whatever is wrong with it."""
    with pytest.raises(InvalidPolicyOutput, match=r"Hierarchical\(num_groups=2\) returned") as caught:
        require_policy_output(Hierarchical(2), output, CURRENT, SMALL)
    assert caught.value.policy == "Hierarchical(num_groups=2)"
