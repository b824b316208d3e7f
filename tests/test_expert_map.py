"""The published routing view."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_eplb import EPTopology, ExpertMap, ExpertPlacement
from async_eplb.errors import TooManyReplicas
from async_eplb.expert_map import dispatch_map, logical_to_all_physical
from async_eplb.testing.sample_model import random_placement

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=2)


def test_maps_of_a_small_layer() -> None:
    """Replicas ascend and are padded with -1; empty slots appear nowhere."""
    placement = ExpertPlacement.from_mapping([[0, 1, 2, 0, 1, -1, 0, 2]], 3)
    published = ExpertMap(placement, TOPOLOGY, rank=0, max_replicas=4)
    assert published.logical_to_all_physical_map.tolist() == [[[0, 3, 6, -1], [1, 4, -1, -1], [2, 7, -1, -1]]]
    assert published.logical_replica_count.tolist() == [[3, 2, 2]]


@pytest.mark.parametrize(
    ("row", "rank", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, {0: 0}),
        ([0, 1, 2, 3, 4, 5, 0, 7], 3, {0: 6}),
        ([0, 1, 2, 3, 0, 5, 6, 7], 1, {0: 0}),
        ([0, 1, 2, 3, 0, 5, 6, 7], 3, {0: 4}),
        ([0, 0, 2, 3, 4, 5, 6, 7], 0, {0: 0}),
    ],
    ids=["only replica", "own rank", "own node", "own node, other", "lowest of own"],
)
def test_dispatch_prefers_near_replicas(row: list[int], rank: int, expected: dict[int, int]) -> None:
    """The only replica; else this rank's lowest; else, if replicas are on several nodes, this node's lowest."""
    chosen = dispatch_map(logical_to_all_physical(np.array(row), 8, 4), TOPOLOGY, rank, seed=0)
    assert {expert: int(chosen[expert]) for expert in expected} == expected


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_ranks_without_a_near_replica_spread_evenly(seed: int, nodes: int, slots: int) -> None:
    """Over all ranks, the replicas that distant ranks choose differ in number by at most one, for any draw."""
    topology = EPTopology(nodes * 4, nodes, slots)
    placement = random_placement(np.random.default_rng(seed), 1, topology.num_physical_experts, 3 if slots == 1 else 5)
    row = placement.physical_to_logical_map[0]
    replicas = logical_to_all_physical(row, placement.num_logical_experts, topology.num_physical_experts)
    choices = np.stack([dispatch_map(replicas, topology, rank, seed=seed) for rank in range(topology.num_ranks)])
    for expert, padded in enumerate(replicas):
        physical = padded[padded >= 0]
        assert set(choices[:, expert]) <= set(physical)
        ranks, node = physical // slots, physical // slots // 4
        if len(set(node)) == 1:
            far = [rank for rank in range(topology.num_ranks) if rank not in ranks]
        else:
            far = [rank for rank in range(topology.num_ranks) if rank // 4 not in node]
        counts = [int((choices[far, expert] == p).sum()) for p in physical]
        if len(physical) > 1:
            assert max(counts) - min(counts) <= 1


@given(st.integers(0, 2**31))
def test_a_published_layer_is_that_of_its_placement(seed: int) -> None:
    """All four tables of an updated map are those of a map made for the new placement."""
    rng = np.random.default_rng(seed)
    old, new = (random_placement(rng, 2, 8, 4) for _ in range(2))
    updated, made = (ExpertMap(placement, TOPOLOGY, rank=seed % 4, seed=7) for placement in (old, new))
    for layer in (1, 0):
        updated.publish(layer, updated.staged(updated.layer_maps(new, layer)))
    tables = [
        "physical_to_logical_map",
        "logical_to_all_physical_map",
        "logical_replica_count",
        "logical_to_dispatch_physical_map",
    ]
    assert [getattr(updated, name).tolist() for name in tables] == [getattr(made, name).tolist() for name in tables]


def test_the_even_spread_is_drawn_anew_for_each_layer_and_seed() -> None:
    """Else the same rank would send all layers' tokens the same way."""
    topology = EPTopology(num_ranks=8, num_nodes=1, num_local_physical_experts=2)
    placement = ExpertPlacement.from_mapping([[0, 1, 0, 1, *range(2, 14)]] * 30)
    one, other = (
        ExpertMap(placement, topology, rank=7, seed=seed).logical_to_dispatch_physical_map[:, 0].tolist()
        for seed in (0, 1000)
    )
    assert set(one) == set(other) == {0, 2}
    assert one != other


def test_the_default_width_is_what_the_slots_can_hold() -> None:
    """One expert may have every slot that the others do not need."""
    published = ExpertMap(ExpertPlacement.trivial(1, 8, 4), TOPOLOGY, rank=0)
    published.require_room(ExpertPlacement.from_mapping([[0, 1, 2, 3, 3, 3, 3, 3]]))
    assert published.logical_to_all_physical_map.shape == (1, 4, 5)


def test_publishing_keeps_addresses_and_other_layers() -> None:
    """Rows are replaced in place, and the layer's generation rises by one."""
    old, new = (ExpertPlacement.from_mapping([row, row], 8) for row in (list(range(8)), list(range(7, -1, -1))))
    published = ExpertMap(old, TOPOLOGY, rank=0)
    addresses = [table.data_ptr() for table in vars(published).values() if hasattr(table, "data_ptr")]
    published.publish(1, published.staged(published.layer_maps(new, 1)))
    assert [table.data_ptr() for table in vars(published).values() if hasattr(table, "data_ptr")] == addresses
    assert published.physical_to_logical_map.tolist() == [list(range(8)), list(range(7, -1, -1))]
    assert published.layer_generation.tolist() == [0, 1]


def test_more_replicas_than_the_map_is_wide_are_refused() -> None:
    """The width is fixed at construction."""
    published = ExpertMap(ExpertPlacement.trivial(1, 8, 4), TOPOLOGY, rank=0, max_replicas=2)
    with pytest.raises(TooManyReplicas) as caught:
        published.require_room(ExpertPlacement.from_mapping([[0, 0, 0, 1, 2, 3, 0, 0]], 4))
    assert (caught.value.replicas, caught.value.limit) == (5, 2)
