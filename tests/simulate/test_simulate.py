"""The simulation: costs of small updates worked out by hand, bounds that hold, and its command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.updates import PLANNERS, Update, examples, updates

from async_eplb import EPTopology, ExpertPlacement, relabel
from async_eplb.cli import main
from async_eplb.errors import InvalidOptions, InvalidTopology, MissingExtra, TooFewSlots
from async_eplb.plan import Planner, find_needs
from async_eplb.simulate import (
    CLUSTERS,
    MODELS,
    VARIANTS,
    Cluster,
    LayerCosts,
    Link,
    UpdateCase,
    compare_plans,
    layer_costs,
    lower_bounds,
)

pytest.importorskip("scipy.optimize")
pytest.importorskip("matplotlib")

CLUSTER = Cluster(2, Link(1000.0, 0.25), Link(100.0, 0.5), node_bytes_per_s=150.0, source="made up")
NBYTES = 100
"""An expert takes 0.1 s within a node and 1 s across nodes; a node sends or receives 1.5 of them in a second."""

FOUR_RANKS = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=2)


def costs_of(update: Update, planner: Planner, cluster: Cluster = CLUSTER) -> LayerCosts:
    """Return what an update takes."""
    old, new = update.old.physical_to_logical_map, update.new.physical_to_logical_map
    transfers = planner.transfers(old, new, update.topology)
    return layer_costs(transfers, len(old), update.topology, cluster, NBYTES)


def update_of(old: list[list[int]], new: list[list[int]]) -> Update:
    """Return an update of four ranks on two nodes."""
    return Update(FOUR_RANKS, *(ExpertPlacement.from_mapping(maps, 8) for maps in (old, new)))


def test_a_layer_takes_its_busiest_link() -> None:
    """Nothing; one expert within a node; two across, from two ranks to one; two across to two ranks of a node."""
    row = [0, 1, 2, 3, 4, 5, 6, 7]
    news = [row, [0, 2, 2, 3, 4, 5, 6, 7], [4, 6, 2, 3, 4, 5, 6, 7], [4, 1, 6, 3, 4, 5, 6, 7]]
    costs = costs_of(update_of([row] * 4, news), Planner())
    assert costs.time_s.tolist() == [0, 0.25 + 0.1, 0.5 + 2.0, 0.5 + 2 / 1.5]
    assert costs.nbytes_within.tolist() == [0, 100, 0, 0]
    assert costs.nbytes_across.tolist() == [0, 0, 200, 200]
    assert costs.num_stages.tolist() == [0, 1, 1, 1]
    assert costs.busiest_rank.tolist()[2] == 0


def test_a_link_that_is_not_duplex_is_shared() -> None:
    """A rank that sends one and receives one takes as long as for two."""
    exchange = update_of([[0, 1, 2, 3, 4, 5, 6, 7]], [[2, 1, 0, 3, 4, 5, 6, 7]])
    half = Cluster(2, Link(1000.0, 0.25, full_duplex=False), CLUSTER.across, 150.0, "made up")
    assert costs_of(exchange, Planner()).time_s.tolist() == [0.25 + 0.1]
    assert costs_of(exchange, Planner(), half).time_s.tolist() == [0.25 + 0.2]


def test_a_relay_trades_a_crossing_for_a_second_stage() -> None:
    """Both ranks of a node need the expert: one second across nodes, then a tenth within."""
    both = update_of([[0, 1, 2, 3, 4, 5, 6, 7]], [[4, 1, 4, 3, 4, 5, 6, 7]])
    assert costs_of(both, Planner()).time_s.tolist() == [0.5 + 2.0]
    relayed = costs_of(both, Planner("relayed"))
    assert relayed.time_s.tolist() == pytest.approx([0.5 + 1.0 + 0.25 + 0.1])
    assert relayed.num_stages.tolist() == [2]


def test_what_is_passed_on_shares_links_with_the_next_layer() -> None:
    """A second layer hides the first one's relay behind a crossing, and waits for it on the links inside nodes."""
    row, both = [0, 1, 2, 3, 4, 5, 6, 7], [4, 1, 4, 3, 4, 5, 6, 7]
    for last, taken_s in (
        (both, 0.5 + 1.0 + 0.25 + 0.1),
        ([0, 2, 2, 3, 4, 5, 6, 7], 0.25 + 0.1),  # the other way on a duplex link
        ([0, 1, 0, 3, 4, 5, 6, 7], 0.25 + 0.2),
    ):
        costs = costs_of(update_of([row] * 2, [both, last]), Planner("relayed"))
        assert costs.time_s.tolist() == pytest.approx([0.5 + 1.0, taken_s])


@examples
@given(updates(), st.sampled_from(PLANNERS))
def test_no_plan_beats_the_bound(update: Update, planner: Planner) -> None:
    """In no layer."""
    old, new = update.old.physical_to_logical_map, update.new.physical_to_logical_map
    bound = lower_bounds(find_needs(old, new, update.topology), len(old), update.topology, CLUSTER, NBYTES)
    assert (costs_of(update, planner).time_s >= bound - 1e-9).all()


def test_experts_have_their_published_sizes() -> None:
    """In megabytes, and how many there are."""
    sizes = {name: (round(m.expert_nbytes / 1e6, 1), m.num_layers, m.num_experts) for name, m in MODELS.items()}
    assert sizes == {
        "deepseek-v3": (44.1, 58, 256),
        "qwen3-235b": (37.7, 94, 128),
        "gpt-oss-120b": (13.2, 36, 128),
        "kimi-k2": (44.1, 60, 384),
    }


@pytest.mark.parametrize("num_ranks", [8, 64, 320, 1024, 4096])
def test_every_size_of_cluster_is_simulated(num_ranks: int) -> None:
    """Our plans take no longer than the reference's, and none beats its bound."""
    model, cluster = MODELS["deepseek-v3"], CLUSTERS["h100"]
    topology = UpdateCase.topology_for(model, cluster, num_ranks)
    costs = compare_plans(UpdateCase(model, cluster, topology, num_layers=1))
    assert set(costs) == set(VARIANTS)
    assert all(each.ratio > 1 - 1e-9 for each in costs.values())
    assert costs["relabel"].time_s <= costs["reference"].time_s


def test_what_does_not_fit_together_is_refused() -> None:
    """Too few slots, and options out of range."""
    model, cluster = MODELS["deepseek-v3"], CLUSTERS["gb200"]
    with pytest.raises(TooFewSlots):
        UpdateCase(model, cluster, EPTopology(4, 1, 2))
    for option, value in (("drift", -1.0), ("policy", "best"), ("num_layers", 0)):
        with pytest.raises(InvalidOptions) as caught:
            UpdateCase(model, cluster, EPTopology(72, 1, 4), **{option: value})  # type: ignore[arg-type]
        assert caught.value.option == option


def test_ranks_go_on_the_fewest_nodes_they_divide_over() -> None:
    """1024 ranks are on 16 nodes of 64 where a node has room for 72."""
    model, cluster = MODELS["kimi-k2"], CLUSTERS["gb200"]
    assert UpdateCase.topology_for(model, cluster, 1024).num_nodes == 16
    assert UpdateCase.topology_for(model, cluster, 144) == EPTopology(144, 2, 3)
    with pytest.raises(InvalidTopology):
        UpdateCase.topology_for(model, cluster, 10**18 + 9)  # a prime


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for each number of ranks, all figures as JSON, and a picture."""
    picture, figures = tmp_path / "a.png", tmp_path / "a.json"
    sizes = ["--ranks", "8", "32", "--layers", "2"]
    assert main(["simulate", *sizes, "--json", str(figures), "--plot", str(picture)]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in VARIANTS)
    assert "32 ranks on 4 nodes" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    updates_ = json.loads(figures.read_text())["updates"]
    assert [each["topology"]["num_ranks"] for each in updates_] == [8, 32]
    for plan in updates_[1]["plans"].values():
        assert sum(plan["layers"]["time_s"]) == pytest.approx(plan["time_s"])
        assert plan["time_s"] / plan["bound_s"] == plan["ratio"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "8", "--nodes", "3"], "do not divide over 3 nodes"),
        (["--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["--ranks", "8", "--slots", "2"], "too few"),
        (["--drift", "-1"], "drift"),
    ],
)
def test_the_command_says_what_does_not_fit(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, with exit status 2."""
    assert main(["simulate", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [("scipy.optimize", "planning", []), ("matplotlib.axes", "plot", ["--plot", "a.png"])],
)
def test_a_missing_extra_is_named(
    module: str, extra: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is simulated."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "async_eplb.cli.plot", raising=False)
    assert main(["simulate", "--layers", "1", *arguments]) == 2
    assert f"install 'async-eplb[{extra}]'" in capsys.readouterr().err


def test_relabelling_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    placement = ExpertPlacement.from_mapping(np.array([[0, 1]]))
    with pytest.raises(MissingExtra) as caught:
        relabel(placement, placement, EPTopology(2, 1, 1))
    assert caught.value.extra == "planning"
