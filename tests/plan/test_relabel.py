"""A relabelled placement is as balanced and moves as little as any choice of places can."""

from collections import Counter
from dataclasses import fields
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.updates import PLANNERS, Update, examples, random_update, updates

from async_eplb import EPTopology, ExpertPlacement, relabel
from async_eplb.errors import InvalidPlacement, LayerCountMismatch
from async_eplb.plan import layer_transfers
from async_eplb.plan.relabel import keep_slots

pytest.importorskip("scipy.optimize")  # here, so that the first example does not take its time

Content = tuple[tuple[int, ...], ...]


def receives(old: list[int], new: list[int], topology: EPTopology) -> tuple[int, int]:
    """Count one layer's receives across nodes, and in all."""
    transfers = layer_transfers(old, new, topology)
    return sum(not transfer.same_node for transfer in transfers), len(transfers)


def nodes_of(row: list[int], topology: EPTopology) -> list[Content]:
    """Return each node's ranks, each its experts, in no order of slots or ranks."""
    ranks = [tuple(sorted(row[topology.slots_of(rank)])) for rank in range(topology.num_ranks)]
    size = topology.num_ranks_per_node
    return [tuple(sorted(ranks[start : start + size])) for start in range(0, topology.num_ranks, size)]


@examples
@given(updates())
def test_ranks_and_nodes_have_what_those_of_the_new_placement_have(update: Update) -> None:
    """So replicas, their sets on ranks and nodes, and the balance are exactly the same."""
    relabelled = Update(update.topology, update.old, relabel(update.old, update.new, update.topology))
    for layer in range(update.old.num_layers):
        (old, new), (_, result) = update.rows(layer), relabelled.rows(layer)
        assert Counter(nodes_of(result, update.topology)) == Counter(nodes_of(new, update.topology))
        assert receives(old, result, update.topology) <= receives(old, new, update.topology)


@pytest.mark.parametrize("topology", [EPTopology(4, 2, 3), EPTopology(6, 3, 2), EPTopology(4, 1, 3)], ids=str)
def test_no_other_choice_of_places_receives_less(topology: EPTopology) -> None:
    """Across nodes first, then in all; against all trades of ranks within nodes and of nodes, where there are few."""
    nodes, size, layers = topology.num_nodes, topology.num_ranks_per_node, 60
    update = random_update(np.random.default_rng(0), topology, layers, 2 * topology.num_physical_experts // 3)
    result = relabel(update.old, update.new, topology).physical_to_logical_map
    orders = list(product(permutations(range(nodes)), product(permutations(range(size)), repeat=nodes)))
    for layer in range(layers):
        old, new = update.rows(layer)
        ranks = np.array(new).reshape(nodes, size, -1)
        choices = [
            [place for node, inside in zip(order, insides, strict=True) for place in ranks[node][list(inside)].ravel()]
            for order, insides in orders
        ]
        best = min(receives(old, choice, topology) for choice in choices)
        assert receives(old, result[layer].tolist(), topology) == best


@examples
@given(updates())
def test_slots_that_keep_their_expert_keep_their_place(update: Update) -> None:
    """A rank leaves as many slots alone as it can."""
    result = relabel(update.old, update.new, update.topology).physical_to_logical_map
    shape = (update.old.num_layers, update.topology.num_ranks, -1)
    for old, new in zip(update.old.physical_to_logical_map.reshape(shape), result.reshape(shape), strict=True):
        for before, after in zip(old, new, strict=True):
            shared = Counter(before.tolist()) & Counter(after.tolist())
            assert (before == after).sum() == shared.total()


@examples
@given(updates(), st.sampled_from(["int8", "int16", ">i4", "int64"]))
def test_maps_of_any_type_of_integers_keep_the_same_slots(update: Update, dtype: str) -> None:
    """And the same experts are moved."""
    before, after = update.old.physical_to_logical_map, update.new.physical_to_logical_map
    for old, new in zip(before, after, strict=True):
        held, wanted = (row.reshape(update.topology.num_ranks, -1) for row in (old, new))
        assert keep_slots(held.astype(dtype), wanted.astype(dtype)).tolist() == keep_slots(held, wanted).tolist()
    for planner in PLANNERS:
        usual = planner.transfers(before, after, update.topology)
        other = planner.transfers(before.astype(dtype), after.astype(dtype), update.topology)
        assert all((getattr(usual, each.name) == getattr(other, each.name)).all() for each in fields(usual))


def test_a_placement_that_is_there_already_stays() -> None:
    """Nothing moves, whatever ranks trade places."""
    old = ExpertPlacement.from_mapping([[0, 1, 2, 3, 0, 1, 2, 3]])
    moved = ExpertPlacement.from_mapping([[3, 2, 1, 0, 2, 3, 1, 0]])
    assert relabel(old, moved, EPTopology(4, 2, 2)) == old


def test_what_does_not_fit_is_refused() -> None:
    """Other layers and other slots."""
    old, more = (ExpertPlacement.from_mapping(maps) for maps in ([[0, 1]], [[0, 1], [0, 1]]))
    with pytest.raises(LayerCountMismatch):
        relabel(old, more, EPTopology(2, 1, 1))
    with pytest.raises(InvalidPlacement):
        relabel(old, old, EPTopology(4, 2, 1))
