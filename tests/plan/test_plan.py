"""Plans of all ranks match and produce the new placement."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.updates import examples

from async_eplb.errors import InvalidPlacement, UnheldExpert
from async_eplb.plan import FanOut, LocalCopy, Recv, Send, SlotSource, layer_transfers, plan_layer
from async_eplb.topology import EPTopology


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[int], list[int], EPTopology]:
    """Draw a topology and two maps with replicas and empty slots, in which no expert is lost."""
    nodes, ranks_per_node, slots = (draw(st.integers(1, 4)) for _ in range(3))
    topology = EPTopology(nodes * ranks_per_node, nodes, slots)
    size = topology.num_physical_experts
    old = draw(st.lists(st.integers(-1, max(0, size - 1)), min_size=size, max_size=size))
    held = sorted(set(old))
    new = draw(st.lists(st.sampled_from([*held, -1]), min_size=size, max_size=size))
    return old, new, topology


@examples
@given(updates())
def test_sends_pair_with_receives_and_give_the_new_placement(case: tuple[list[int], list[int], EPTopology]) -> None:
    """Each send has exactly one receive; executing all plans on tagged values gives the new placement."""
    old, new, topology = case
    plans = [plan_layer(old, new, topology, rank) for rank in range(topology.num_ranks)]
    slots = topology.num_local_physical_experts
    sends = [(rank, s.dst_rank, s.logical_expert) for rank, plan in enumerate(plans) for s in plan.sends]
    recvs = [(r.src_rank, rank, r.logical_expert) for rank, plan in enumerate(plans) for r in plan.recvs]
    assert sorted(sends) == sorted(recvs)
    assert len(set(sends)) == len(sends)
    wire = {
        (rank, s.dst_rank, s.logical_expert): old[rank * slots + s.src_slot]
        for rank, plan in enumerate(plans)
        for s in plan.sends
    }
    for rank, plan in enumerate(plans):
        live = dict(enumerate(old[topology.slots_of(rank)]))
        staged = {copy.dst_slot: live[copy.src_slot] for copy in plan.local_copies}
        staged |= {recv.dst_slot: wire[recv.src_rank, rank, recv.logical_expert] for recv in plan.recvs}
        result = live | staged
        result |= {fan_out.dst_slot: staged[fan_out.staged_slot] for fan_out in plan.fan_outs}
        for slot, wanted in enumerate(new[topology.slots_of(rank)]):
            assert wanted == -1 or result[slot] == wanted


@examples
@given(updates())
def test_a_node_that_holds_an_expert_serves_itself(case: tuple[list[int], list[int], EPTopology]) -> None:
    """A receive crosses nodes only if the expert was on no rank of its own node."""
    old, new, topology = case
    for transfer in layer_transfers(old, new, topology):
        node = topology.node_of(transfer.dst_rank)
        on_node = [e for p, e in enumerate(old) if topology.node_of(topology.rank_of(p)) == node]
        assert transfer.same_node == (transfer.logical_expert in on_node)


def test_every_source_once() -> None:
    """One layer in which all six sources occur, with the exact plan of the rank."""
    topology = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=6)
    old = [0, 1, 2, 3, 4, 5] + [6] * 6 + [7] * 6 + [7] * 6
    new = [0, 2, 6, 6, 7, -1] + [1] * 6 + [3] * 6 + [4, 5, 7, 7, 7, 7]
    plan = plan_layer(old, new, topology, 0)
    assert plan.slot_sources == (
        SlotSource.UNCHANGED,
        SlotSource.SAME_GPU,
        SlotSource.SAME_NODE,
        SlotSource.FREE_RIDER,
        SlotSource.CROSS_NODE,
        SlotSource.EMPTY,
    )
    assert plan.local_copies == (LocalCopy(src_slot=2, dst_slot=1),)
    assert plan.recvs == (Recv(6, 1, 2), Recv(7, 2, 4))
    assert plan.fan_outs == (FanOut(staged_slot=2, dst_slot=3),)
    assert plan.staged_slots == (1, 2, 4)
    assert plan.sends == (Send(1, 1, 1), Send(3, 2, 3), Send(4, 3, 4), Send(5, 3, 5))


def test_the_lowest_slot_that_holds_an_expert_is_its_source() -> None:
    """For copies on the same rank and for sends."""
    topology = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
    plan = plan_layer([5, 0, 0, 1, 2, 3], [0, 0, 0, 0, 5, 5], topology, 0)
    assert plan.local_copies == (LocalCopy(src_slot=1, dst_slot=0),)
    assert plan.sends == (Send(0, 1, src_slot=1), Send(5, 1, src_slot=0))


def test_a_slot_that_stays_empty_is_empty() -> None:
    """Not unchanged: there is nothing in it that could be."""
    plan = plan_layer([0, -1], [0, -1], EPTopology(1, 1, 2), 0)
    assert plan.slot_sources == (SlotSource.UNCHANGED, SlotSource.EMPTY)


def test_destinations_are_chunked_over_sources() -> None:
    """Five destinations over two sources: the first source serves three, the second two, in rank order."""
    topology = EPTopology(num_ranks=7, num_nodes=1, num_local_physical_experts=1)
    transfers = layer_transfers([0, 0, 1, 2, 3, 4, 5], [0] * 7, topology)
    assert [(t.src_rank, t.dst_rank) for t in transfers] == [(0, 2), (0, 3), (0, 4), (1, 5), (1, 6)]


def test_cross_node_destinations_use_all_sources() -> None:
    """Same-node destinations come first; cross-node ones are chunked over the sources of all nodes."""
    topology = EPTopology(num_ranks=6, num_nodes=3, num_local_physical_experts=1)
    transfers = layer_transfers([0, 1, 0, 2, 3, 4], [0, 0, 0, 0, 0, 0], topology)
    assert [(t.src_rank, t.dst_rank) for t in transfers] == [(0, 1), (2, 3), (0, 4), (2, 5)]


def test_an_expert_that_nobody_holds_is_refused() -> None:
    """The error names the expert."""
    with pytest.raises(UnheldExpert) as caught:
        plan_layer([0, 1], [0, 2], EPTopology(2, 1, 1), 0)
    assert caught.value.logical_expert == 2


def test_a_map_of_another_size_is_refused() -> None:
    """A map needs one entry for each slot."""
    with pytest.raises(InvalidPlacement):
        plan_layer([0, 1, 2], [0, 1, 2], EPTopology(2, 1, 1), 0)
