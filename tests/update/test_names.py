"""Two updaters of one group are never mixed (rule 17): names and layouts are compared when they open."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.groups import TINY, small_updater, stateless_groups
from support.helpers import together

from async_eplb import (
    EventLogger,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    MemoryTransport,
    SyncUpdater,
    TorchDistTransport,
)
from async_eplb.errors import BusyGroup, EplbError, InvalidOptions, UpdaterMismatch
from async_eplb.testing.sample_model import SampleModel
from async_eplb.topology import EPTopology
from async_eplb.transport.identity import Identity, require_one

pytestmark = pytest.mark.anyio

NEW = ExpertPlacement.from_mapping([[3, 2, 1, 0]])
OLD = ExpertPlacement.trivial(1, 4, 4)


async def enter(*updaters: ExpertUpdater) -> str:
    """Enter one updater after another, and leave them in turn."""
    if not updaters:
        return "entered"
    async with updaters[0]:
        return await enter(*updaters[1:])


async def entered(ranks: Sequence[Sequence[ExpertUpdater]]) -> list[Any]:
    """Return what becomes of each rank that enters its updaters."""
    return await together([partial(enter, *updaters) for updaters in ranks])


def on_each_rank(*names: Sequence[str | None]) -> list[list[ExpertUpdater]]:
    """Make updaters of these names on each rank of one group, in this order."""
    groups = stateless_groups(len(names))
    return [
        [small_updater(TorchDistTransport(group), name=name) for name in each]
        for group, each in zip(groups, names, strict=True)
    ]


@pytest.mark.parametrize(
    ("first", "second"), [(("target", "draft"), ("draft", "target")), ((None, "draft"), ("draft", None))], ids=str
)
async def test_another_order_on_one_rank_is_told_to_all(first: Sequence[str], second: Sequence[str]) -> None:
    """Though the layouts are equal: the error has both names."""
    outcomes = await entered(on_each_rank(first, first, second))
    for outcome in outcomes:
        assert isinstance(outcome, UpdaterMismatch)
        assert outcome.names == (first[0] or "", first[0] or "", second[0])
        assert f"{first[0]!r} on ranks [0, 1], {second[0]!r} on ranks [2]" in str(outcome)


async def test_two_without_a_name_are_refused() -> None:
    """The second one, on all ranks, with what to do; also if another rank has called it otherwise."""
    outcomes = await entered(on_each_rank([None, None], [None, None]))
    for outcome in outcomes:
        assert isinstance(outcome, BusyGroup)
        assert (outcome.updater, outcome.ranks) == ("", (0, 1))
        assert "ExpertUpdater(name=...)" in str(outcome)
    outcomes = await entered(on_each_rank(["target", "target"], ["target", "target"]))
    assert [(type(outcome), outcome.updater) for outcome in outcomes] == [(BusyGroup, "target")] * 2


@pytest.mark.parametrize("names", [["target", "draft"], [None, "draft"], ["target", "draft", None]], ids=str)
async def test_updaters_of_other_names_are_open_side_by_side(names: Sequence[str | None]) -> None:
    """One of them may have none."""
    assert await entered(on_each_rank(names, names)) == ["entered"] * 2


async def test_a_name_is_free_when_its_updater_has_left_or_failed_to_open() -> None:
    """In the same group, again and again; other groups have names of their own."""
    groups, others = stateless_groups(2), stateless_groups(2)

    def make(of: Sequence[Any]) -> list[ExpertUpdater]:
        return [small_updater(TorchDistTransport(group)) for group in of]

    for _ in range(2):
        assert await together([partial(enter, updater) for updater in make(groups)]) == ["entered"] * 2
        missing = small_updater(TorchDistTransport(stateless_groups(2)[0]), open_timeout_s=0.05)
        assert isinstance((await together([partial(enter, missing)]))[0], EplbError)
    pairs = zip(make(groups), make(others), strict=True)
    assert await together([partial(enter, *pair) for pair in pairs]) == ["entered"] * 2


async def test_another_layout_is_told_to_all() -> None:
    """Also without names."""
    groups = stateless_groups(2)
    models = (TINY, SampleModel(hidden=16, intermediate=4))
    updaters = [
        small_updater(TorchDistTransport(group), model=model) for group, model in zip(groups, models, strict=True)
    ]
    for outcome in await together([partial(enter, updater) for updater in updaters]):
        assert isinstance(outcome, UpdaterMismatch)
        assert "the layout of the weights" in str(outcome)


async def test_another_topology_is_told_to_all() -> None:
    """It decides who sends what to whom."""
    updaters = [
        ExpertUpdater(
            ExpertWeights(TINY.weights(OLD, topology, transport.rank)),
            OLD,
            topology,
            rank=transport.rank,
            transport=transport,
        )
        for topology, transport in zip(
            (EPTopology(2, 1, 2), EPTopology(2, 2, 2)), map(TorchDistTransport, stateless_groups(2)), strict=True
        )
    ]
    for outcome in await together([partial(enter, updater) for updater in updaters]):
        assert isinstance(outcome, UpdaterMismatch)
        assert "the topology" in str(outcome)


@pytest.mark.parametrize("name", [None, "target"])
async def test_an_updater_recovers_and_audits_under_its_name(name: str | None) -> None:
    """Over new transports of the same group, beside another updater, and then updates on."""
    groups = stateless_groups(2)
    mine = [small_updater(TorchDistTransport(group), name=name) for group in groups]
    beside = [small_updater(TorchDistTransport(group), name="beside") for group in groups]

    async def live(rank: int) -> ExpertPlacement:
        async with beside[rank], mine[rank]:
            for new in (NEW, OLD):
                await mine[rank].recover(TorchDistTransport(groups[rank]))
                await mine[rank].update(new)
                report = await mine[rank].audit(TorchDistTransport(groups[rank]))
                assert report.mismatches == ()
            return mine[rank].placement

    assert await together([partial(live, rank) for rank in range(2)]) == [OLD] * 2


@pytest.mark.parametrize("act", [ExpertUpdater.audit, ExpertUpdater.recover])
async def test_what_an_updater_opens_later_is_not_mixed_with_another_updater(act: Callable[..., Any]) -> None:
    """Transports for audits and recoveries that are made in another order are told from each other by name, too."""
    groups = stateless_groups(2)
    target, draft = ([small_updater(TorchDistTransport(g), name=name) for g in groups] for name in ("target", "draft"))

    async def live(rank: int) -> object:
        async with target[rank], draft[rank]:
            return await act((target, draft)[rank][rank], TorchDistTransport(groups[rank]))

    outcomes = await together([partial(live, rank) for rank in range(2)])
    assert [type(outcome) for outcome in outcomes] == [UpdaterMismatch] * 2


async def test_names_in_memory_are_compared() -> None:
    """Each rank waits for the others, and all are told."""
    transports = MemoryTransport.world(2)
    updaters = [small_updater(each, name=name) for each, name in zip(transports, ("target", "draft"), strict=True)]
    outcomes = await together([partial(enter, updater) for updater in updaters])
    assert [(type(outcome), outcome.names) for outcome in outcomes] == [(UpdaterMismatch, ("target", "draft"))] * 2
    updaters = [small_updater(each, name="target") for each in MemoryTransport.world(2)]
    assert await together([partial(enter, updater) for updater in updaters]) == ["entered"] * 2


async def test_events_and_descriptions_have_the_name() -> None:
    """So that the events of two models are told apart."""
    seen: list[dict[str, Any]] = []
    (transport,) = MemoryTransport.world(1)
    topology = EPTopology(1, 1, 4)
    updater = ExpertUpdater(
        ExpertWeights(TINY.weights(OLD, topology, 0)),
        OLD,
        topology,
        rank=0,
        name="draft",
        transport=transport,
        logger=EventLogger(observers=[lambda event: seen.append(dict(event))]),
    )
    async with updater:
        assert repr(updater) == "<ExpertUpdater 'draft' rank 0 of 1, idle>"
        assert updater.name == "draft"
        await updater.update(NEW)
    assert seen
    assert {event["updater"] for event in seen} == {"draft"}


def test_the_synchronous_updater_has_a_name() -> None:
    """The same one."""
    (transport,) = MemoryTransport.world(1)
    topology = EPTopology(1, 1, 4)
    weights = ExpertWeights(TINY.weights(OLD, topology, 0))
    assert SyncUpdater(weights, OLD, topology, rank=0, name="draft", transport=transport).name == "draft"


@pytest.mark.parametrize("name", ["", 3, b"draft", ["draft"]])
async def test_what_is_no_name_is_refused(name: Any) -> None:
    """Before anything is connected."""
    with pytest.raises(InvalidOptions) as caught:
        small_updater(MemoryTransport.world(1)[0], name=name)
    assert caught.value.option == "name"


IDENTITIES = st.builds(Identity, *[st.sampled_from(["", "a", "b"])] * 3)


@given(st.lists(st.tuples(IDENTITIES, st.booleans()), min_size=1, max_size=4))
def test_all_ranks_draw_the_same_conclusion(told: list[tuple[Identity, bool]]) -> None:
    """From what all of them give; only equal ones that are not taken pass."""
    texts = [identity.to_json(taken=taken) for identity, taken in told]
    kinds: set[tuple[type, object]] = set()
    for rank in range(len(texts)):
        try:
            require_one(texts, rank)
        except (UpdaterMismatch, BusyGroup) as error:
            kinds.add((type(error), getattr(error, "ranks", None)))
        else:
            kinds.add((type(None), None))
    same, taken_by = len({identity for identity, _ in told}) == 1, tuple(n for n, (_, t) in enumerate(told) if t)
    expected = (UpdaterMismatch, None) if not same else (BusyGroup, taken_by) if taken_by else (type(None), None)
    assert kinds == {expected}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda t: st.lists(t) | st.dictionaries(st.text(), t)
)


@given(st.text() | JSON.map(json.dumps) | st.just("[" * 100_000) | st.just('[{"name": 3}, true]'))
def test_what_no_rank_of_this_version_writes_is_another_updater(text: str) -> None:
    """Whatever it is, all ranks are told; the error shows it."""
    with pytest.raises((UpdaterMismatch, BusyGroup)):
        require_one([Identity("target", "a", "b").to_json(), text], 0)
