"""Planners keep their promises of sources and crossings; updates with each of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import anyio
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from support.helpers import memory_world, on_all
from support.updates import PLANNERS, Update, examples, updates

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, UpdateOptions
from async_eplb.agreement.rules import LaunchRule
from async_eplb.errors import InvalidOptions, PlacementDisagreement
from async_eplb.plan import Planner, Transfers
from async_eplb.plan.balance import balanced
from async_eplb.testing.sample_model import random_placement
from async_eplb.transport import MemorySchedule


def transfers_of(update: Update, planner: Planner) -> Transfers:
    """Return what all ranks send."""
    old, new = update.old.physical_to_logical_map, update.new.physical_to_logical_map
    return planner.transfers(old, new, update.topology)


def loads(transfers: Transfers, ranks: Sequence[int], chosen: Sequence[bool]) -> Mapping[int, Counter[int]]:
    """Count the chosen transfers of each layer by rank."""
    counted: dict[int, Counter[int]] = {}
    for layer, rank, counts in zip(transfers.layer.tolist(), ranks, chosen, strict=True):
        if counts:
            counted.setdefault(layer, Counter())[rank] += 1
    return counted


def fewest_at_most(options: Sequence[Sequence[int]]) -> int:
    """Return the smallest number of items in the fullest bin, by augmenting paths, one item after another."""
    limit = 1
    given_to: dict[int, list[int]] = {}

    def place(item: int, tried: set[int]) -> bool:
        for chosen in options[item]:
            if chosen in tried:
                continue
            tried.add(chosen)
            items = given_to.setdefault(chosen, [])
            if len(items) < limit:
                items.append(item)
                return True
            for index, other in enumerate(items):
                if place(other, tried):
                    items[index] = item
                    return True
        return False

    for item in range(len(options)):
        while not place(item, set()):
            limit += 1
    return limit if options else 0


@examples
@given(st.data())
def test_the_fullest_bin_is_as_empty_as_it_can_be(data: st.DataObject) -> None:
    """In every layer, wherever the search begins; found in another way."""
    num_layers, num_bins, num_options = (data.draw(st.integers(1, most)) for most in (3, 6, 8))
    bins = data.draw(st.lists(st.integers(0, num_bins - 1), min_size=num_options, max_size=num_options))
    ranges = data.draw(
        st.lists(st.tuples(*[st.integers(0, num_options - 1)] * 2, st.integers(0, num_layers - 1)), max_size=25)
    )
    first, last, layer = (np.array([entry[i] for entry in ranges], dtype=np.intp) for i in range(3))
    first, count = np.minimum(first, last), abs(last - first) + 1
    nothing = np.zeros((num_layers, num_bins), dtype=np.int64)
    chosen = balanced(first, first, count, layer, np.array(bins), nothing)
    assert ((first <= chosen) & (chosen < first + count)).all()
    for each in range(num_layers):
        options = [bins[f : f + c] for f, c in zip(first[layer == each], count[layer == each], strict=True)]
        fullest = max(Counter(bins[option] for option in chosen[layer == each]).values(), default=0)
        assert fullest == fewest_at_most(options)


@examples
@given(updates(), st.sampled_from(["balanced", "relayed"]))
def test_the_busiest_sender_across_nodes_sends_as_little_as_it_can(update: Update, sources: str) -> None:
    """The optimum of every layer, found in another way."""
    topology = update.topology
    transfers = transfers_of(update, Planner(sources))
    across = (~transfers.same_node).tolist()
    sent = loads(transfers, transfers.src_rank.tolist(), across)
    for layer in range(update.old.num_layers):
        held = np.array(update.rows(layer)[0]).reshape(topology.num_ranks, -1)
        options = [
            np.flatnonzero((held == expert).any(axis=1)).tolist()
            for expert, of, crosses in zip(
                transfers.logical_expert.tolist(), transfers.layer.tolist(), across, strict=True
            )
            if crosses and of == layer
        ]
        assert max(sent.get(layer, Counter()).values(), default=0) == fewest_at_most(options)


@dataclass(frozen=True)
class Served:
    """Needs of one layer: whether each is served across nodes, and by whom it can be; what is passed on besides."""

    choices: tuple[tuple[bool, tuple[int, ...]], ...]
    passed_on: Counter[int]

    @classmethod
    def of(cls, update: Update, layer: int, transfers: Transfers) -> "Served":
        """Return them for a layer of a plan."""
        topology = update.topology
        held = np.array(update.rows(layer)[0]).reshape(topology.num_ranks, -1)
        here = transfers.take(transfers.layer == layer)
        choices = []
        for expert, dst, near in zip(here.logical_expert, here.dst_rank, here.same_node & ~here.relayed, strict=True):
            holders = np.flatnonzero((held == expert).any(axis=1))
            if near:
                holders = holders[holders // topology.num_ranks_per_node == dst // topology.num_ranks_per_node]
            choices.append((not near, tuple(holders.tolist())))
        kept = [choice for choice, relayed in zip(choices, here.relayed.tolist(), strict=True) if not relayed]
        return cls(tuple(kept), Counter(here.src_rank[here.relayed].tolist()))

    def fit(self, across: int, in_all: int) -> bool:
        """Return whether no rank must send more than so many across nodes, and in all: by a maximum flow."""
        if max(self.passed_on.values(), default=0) > in_all:
            return False
        ranks = sorted({rank for _, holders in self.choices for rank in holders})
        source, sink, count = 0, 1, len(self.choices)
        crossing, sending = ({rank: 2 + count + n * len(ranks) + i for i, rank in enumerate(ranks)} for n in range(2))
        edges = [(crossing[rank], sending[rank], across) for rank in ranks]
        edges += [(sending[rank], sink, in_all - self.passed_on[rank]) for rank in ranks]
        for number, (crosses, holders) in enumerate(self.choices):
            edges.append((source, 2 + number, 1))
            edges += [(2 + number, (crossing if crosses else sending)[rank], 1) for rank in holders]
        tails, heads, capacities = np.array(edges, dtype=np.int32).reshape(-1, 3).T
        size = 2 + count + 2 * len(ranks)
        network = csr_array((capacities, (tails, heads)), shape=(size, size))
        return int(maximum_flow(network, source, sink).flow_value) == count


@examples
@given(updates(), st.sampled_from(["balanced", "relayed"]))
def test_of_such_choices_the_busiest_sender_in_all_sends_as_little_as_it_can(update: Update, sources: str) -> None:
    """No rank sends more across nodes than that; what is passed on is given."""
    transfers = transfers_of(update, Planner(sources))
    sent, across = (
        loads(transfers, transfers.src_rank.tolist(), chosen.tolist())
        for chosen in (np.ones_like(transfers.same_node), ~transfers.same_node)
    )
    for layer, counts in sent.items():
        most_across = max(across.get(layer, Counter()).values(), default=0)
        served = Served.of(update, layer, transfers)
        assert served.fit(most_across, max(counts.values()))
        assert not served.fit(most_across, max(counts.values()) - 1)


@pytest.mark.parametrize("number", [5, 6])
def test_few_crossings_and_few_sends_can_exclude_each_other(number: int) -> None:
    """Two ranks hold six experts, which another node needs, and one of them its own: both cannot be within one.

    With five they can: one rank then sends four across nodes, and the other six in all.
    """
    topology = EPTopology(6, 3, number)
    ours, *others = np.arange(5 * number).reshape(5, number)
    rows = np.array([[ours, others[0], ours, *others[1:]], [ours, ours, ours, others[1], ours, others[3]]])
    maps = rows.reshape(2, 1, -1)
    update = Update(topology, *(ExpertPlacement.from_mapping(row, 5 * number) for row in maps))
    transfers = transfers_of(update, Planner("balanced"))
    served = Served.of(update, 0, transfers)
    least_across, least_in_all = -(-number // 2), number
    assert served.fit(least_across, number * 2)
    assert not served.fit(least_across - 1, number * 2)
    assert served.fit(number, least_in_all)
    assert not served.fit(number, least_in_all - 1)
    assert served.fit(least_across + 1, least_in_all + 1) == (number == 5)
    across = np.bincount(transfers.src_rank[~transfers.same_node], minlength=6)
    assert sorted(across[[0, 2]].tolist()) == [number // 2, least_across]
    assert np.bincount(transfers.src_rank).max() == number + number // 2


@examples
@given(updates())
def test_on_one_node_the_busiest_sender_sends_as_little_as_it_can(update: Update) -> None:
    """Likewise within a node, where no expert crosses."""
    topology = EPTopology(update.topology.num_ranks, 1, update.topology.num_local_physical_experts)
    alone = Update(topology, update.old, update.new)
    transfers = transfers_of(alone, Planner("balanced"))
    sent = loads(transfers, transfers.src_rank.tolist(), [True] * len(transfers.layer))
    for layer, counts in sent.items():
        held = np.array(alone.rows(layer)[0]).reshape(topology.num_ranks, -1)
        experts = transfers.logical_expert[transfers.layer == layer].tolist()
        options = [np.flatnonzero((held == expert).any(axis=1)).tolist() for expert in experts]
        assert max(counts.values()) == fewest_at_most(options)


@examples
@given(updates())
def test_an_expert_crosses_to_a_node_once(update: Update) -> None:
    """Relays save all crossings but one of each expert and node; the fullest receiver is as empty as it can be."""
    topology = update.topology
    relayed, plain = (transfers_of(update, Planner(sources)) for sources in ("relayed", "chunked"))
    wanted: dict[tuple[int, int, int], list[int]] = {}
    for layer, expert, rank, near in zip(
        plain.layer.tolist(), plain.logical_expert.tolist(), plain.dst_rank.tolist(), plain.same_node, strict=True
    ):
        if not near:
            wanted.setdefault((layer, expert, topology.node_of(rank)), []).append(rank)
    across = ~relayed.same_node
    crossing = zip(relayed.layer[across], relayed.logical_expert[across], relayed.dst_rank[across], strict=True)
    crossed = [(int(layer), int(expert), topology.node_of(int(rank))) for layer, expert, rank in crossing]
    assert sorted(crossed) == sorted(wanted)
    received = loads(relayed, relayed.dst_rank.tolist(), across.tolist())
    for layer, counts in received.items():
        assert max(counts.values()) == fewest_at_most([ranks for key, ranks in wanted.items() if key[0] == layer])


@pytest.mark.parametrize("planner", PLANNERS, ids=str)
def test_every_planner_moves_every_byte(planner: Planner) -> None:
    """Several updates in memory, with delays, small groups and checksums."""
    topology = EPTopology(6, 2, 4)
    rng = np.random.default_rng(0)
    placements = [random_placement(rng, 3, topology.num_physical_experts, 14, num_empty=i % 2) for i in range(4)]
    options = UpdateOptions(planner=planner, verify="checksum", operations_per_group=20)

    async def update() -> None:
        schedule = MemorySchedule(message_jitter_s=0.1, control_s=0.02)
        async with memory_world(placements[0], topology, options=options, schedule=schedule) as ranks:
            for new in placements[1:]:
                await on_all(ranks, partial(ExpertUpdater.update, new_placement=new))
                assert all(rank.updater.placement == new for rank in ranks)
                for rank in ranks:
                    rank.assert_consistent()

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("planner", PLANNERS, ids=str)
def test_every_planner_moves_every_byte_while_serving(planner: Planner) -> None:
    """Launched at agreed boundaries, one group of an exchange after another."""
    topology = EPTopology(6, 2, 4)
    rng = np.random.default_rng(1)
    old, new = (random_placement(rng, 3, topology.num_physical_experts, 14) for _ in range(2))
    options = UpdateOptions(planner=planner, verify="checksum", operations_per_group=20)
    schedule = MemorySchedule(message_jitter_s=1.0, control_s=0.04, launch_rule=LaunchRule.ORDERED)

    async def serve(updater: ExpertUpdater) -> None:
        handle = updater.begin(new)
        while updater.statistics().updating:
            await updater.step()
            await anyio.sleep(0.05)  # so that a group is launched long before the one before it has arrived
        await handle.wait()

    async def update() -> None:
        async with memory_world(old, topology, options=options, schedule=schedule) as ranks:
            outcomes = await on_all(ranks, serve)
            assert outcomes == [None] * topology.num_ranks
            for rank in ranks:
                assert rank.updater.placement == new
                rank.assert_consistent()

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


def outcomes_of(options: Sequence[UpdateOptions], rule: LaunchRule = LaunchRule.AT_ONCE) -> list[object]:
    """Return what becomes of an update of two ranks, each with its options."""
    topology = EPTopology(2, 1, 2)
    old, new = (random_placement(np.random.default_rng(seed), 2, 4, 3) for seed in (0, 1))

    async def update() -> list[object]:
        async with memory_world(old, topology, schedule=MemorySchedule(launch_rule=rule), options=options) as ranks:
            return await on_all(ranks, lambda u: u.update(new))

    return trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


def test_ranks_with_different_planners_do_not_begin() -> None:
    """Their plans would not match, so nothing moves."""
    outcomes = outcomes_of([UpdateOptions(), UpdateOptions(planner=Planner("balanced"))])
    assert [type(outcome) for outcome in outcomes] == [PlacementDisagreement] * 2


@pytest.mark.parametrize("rule", [rule for rule in LaunchRule if rule.needs_grant], ids=str)
def test_a_transport_that_reads_live_weights_refuses_relays(rule: LaunchRule) -> None:
    """Before anything moves."""
    relaying = UpdateOptions(planner=Planner("relayed"))
    outcomes = outcomes_of([relaying, relaying], rule)
    assert [getattr(outcome, "option", outcome) for outcome in outcomes] == ["planner"] * 2


def test_a_planner_that_is_none_is_refused() -> None:
    """The error names the option."""
    with pytest.raises(InvalidOptions, match="sources") as caught:
        Planner("nearest")
    assert caught.value.option == "sources"
