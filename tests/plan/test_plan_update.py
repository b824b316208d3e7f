"""All layers at once are planned as one after another, slot by slot; groups match and are bounded."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.updates import PLANNERS, Update, examples, execute, random_update, updates

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import InvalidPlacement, LayerCountMismatch, UnheldExpert
from async_eplb.plan import (
    Planner,
    PostedUpdate,
    Transfer,
    layer_transfers,
    plan_layer,
    plan_update,
    staged_slot_counts,
)


@examples
@given(updates())
def test_every_rank_gets_what_the_reference_plans(update: Update) -> None:
    """For each layer and rank the plans are equal, in all their orders."""
    for rank, plan in enumerate(update.plans()):
        assert list(plan) == [
            plan_layer(*update.rows(layer), update.topology, rank) for layer in range(update.old.num_layers)
        ]


@examples
@given(updates())
def test_staging_counts_are_what_plans_stage(update: Update) -> None:
    """Without a plan made, of this rank; and of all ranks, which each of them knows."""
    plans = update.plans(Planner("relayed"))
    for plan in plans:
        assert plan.staged_slot_counts == [len(layer.staged_slots) for layer in plan]
    of_all = staged_slot_counts(update.old.physical_to_logical_map, update.new.physical_to_logical_map, update.topology)
    assert of_all.T.tolist() == [plan.staged_slot_counts for plan in plans]


@examples
@given(updates(), st.sampled_from(PLANNERS), st.integers(1, 5))
def test_every_planner_delivers_every_slot_once_in_bounded_groups(update: Update, planner: Planner, limit: int) -> None:
    """Sends pair with receives, all slots get their expert, and no rank does more than the limit in one group."""
    ranks = update.posted(planner, limit)
    for layer in range(update.old.num_layers):
        posted = [rank[layer] for rank in ranks]
        plans = [each.plan for each in posted]
        sent = [
            (group, rank, send.dst_rank, send.logical_expert)
            for rank, each in enumerate(posted)
            for sends, groups in ((each.plan.sends, each.send_groups), (each.plan.relays, each.relay_groups))
            for send, group in zip(sends, groups, strict=True)
        ]
        received = [
            (group, recv.src_rank, rank, recv.logical_expert)
            for rank, each in enumerate(posted)
            for recv, group in zip(each.plan.recvs, each.recv_groups, strict=True)
        ]
        assert sorted(sent) == sorted(received)
        assert len(set(received)) == len(received)
        operations = Counter((group, rank) for group, *ends, _ in sent for rank in ends)
        assert max(operations.values(), default=0) <= limit
        assert {each.num_groups for each in posted} == {len({group for group, *_ in sent})}
        _, new = update.rows(layer)
        result = execute(update, layer, plans).reshape(-1)
        assert all(wanted in (-1, got) for wanted, got in zip(new, result.tolist(), strict=True))


@examples
@given(updates(), st.integers(1, 5))
def test_groups_begin_where_one_would_become_too_large(update: Update, limit: int) -> None:
    """They are those of a plain loop over the transfers in their order."""
    plan = update.plans()[0]
    expected = [
        group
        for layer in range(update.old.num_layers)
        for group in groups_one_by_one(layer_transfers(*update.rows(layer), update.topology), limit)
    ]
    posted = PostedUpdate(plan, [limit] * update.old.num_layers)
    assert posted.groups.tolist() == expected


def groups_one_by_one(transfers: Sequence[Transfer], limit: int) -> list[int]:
    """Number groups transfer by transfer."""
    groups: list[int] = []
    load: Counter[int] = Counter()
    group = 0
    for transfer in transfers:
        ends = (transfer.src_rank, transfer.dst_rank)
        if any(load[rank] >= limit for rank in ends):
            group += 1
            load.clear()
        load.update(ends)
        groups.append(group)
    return groups


@examples
@given(updates(), st.sampled_from(PLANNERS), st.integers(1, 5))
def test_no_order_of_waiting_deadlocks(update: Update, planner: Planner, limit: int) -> None:
    """An operation ends when its peer has posted it too; a rank posts a group when its last one has ended."""
    ranks = update.posted(planner, limit)
    for layer in range(update.old.num_layers):
        pending: list[list[set[tuple[int, int, int]]]] = []
        for rank, update_of_rank in enumerate(ranks):
            each = update_of_rank[layer]
            groups: list[set[tuple[int, int, int]]] = [set() for _ in range(each.num_groups)]
            for sends, numbers in ((each.plan.sends, each.send_groups), (each.plan.relays, each.relay_groups)):
                for send, number in zip(sends, numbers, strict=True):
                    groups[number].add((rank, send.dst_rank, send.logical_expert))
            for recv, number in zip(each.plan.recvs, each.recv_groups, strict=True):
                groups[number].add((recv.src_rank, rank, recv.logical_expert))
            pending.append(groups)
        assert rendezvous(pending)


def rendezvous(pending: list[list[set[tuple[int, int, int]]]]) -> bool:
    """Let operations meet until none can; return whether all have."""
    while any(pending):
        pending = [groups[next((i for i, g in enumerate(groups) if g), len(groups)) :] for groups in pending]
        posted = Counter(operation for groups in pending for operation in (groups[0] if groups else ()))
        met = {operation for operation, sides in posted.items() if sides == 2}
        if not met:
            return not any(pending)
        for groups in pending:
            if groups:
                groups[0] -= met
    return True


def test_a_relay_is_sent_after_it_is_received() -> None:
    """Its group comes after the group in which the rank receives the expert."""
    update = random_update(np.random.default_rng(0), EPTopology(8, 2, 4), 20, 12)
    num_relays = 0
    for rank in update.posted(Planner("relayed"), 3):
        for layer in range(20):
            each = rank[layer]
            arrives = {recv.dst_slot: g for recv, g in zip(each.plan.recvs, each.recv_groups, strict=True)}
            for relay, group in zip(each.plan.relays, each.relay_groups, strict=True):
                assert group > arrives[relay.src_slot]
                num_relays += 1
    assert num_relays > 20


def test_chosen_layers_are_planned_in_their_order() -> None:
    """An update may leave layers out."""
    update = random_update(np.random.default_rng(1), EPTopology(4, 2, 3), 5, 8)
    every = plan_update(update.old, update.new, update.topology, 1)
    chosen = plan_update(update.old, update.new, update.topology, 1, layers=(1, 3))
    assert list(chosen) == [every[1], every[3]]
    assert every[1:4:2] == list(chosen)


def test_what_does_not_fit_is_refused() -> None:
    """Other layers, other slots, and an expert that nobody holds."""
    topology = EPTopology(2, 1, 1)
    old, new, more, wider = (
        ExpertPlacement.from_mapping(maps, 3) for maps in ([[0, 1]], [[0, 2]], [[0, 1], [0, 1]], [[0, 1, 2]])
    )
    with pytest.raises(UnheldExpert) as caught:
        plan_update(old, new, topology, 0)
    assert caught.value.logical_expert == 2
    with pytest.raises(LayerCountMismatch):
        plan_update(old, more, topology, 0)
    with pytest.raises(InvalidPlacement):
        plan_update(wider, wider, topology, 0)
