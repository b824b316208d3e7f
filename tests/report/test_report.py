"""Reports of real runs: their numbers add up, and are those of the plans."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.logs import NUM_LAYERS, SERVING, events_of, log_of_processes, log_of_serving, rewrite

from async_eplb import EPTopology, ExpertPlacement, plan_layer
from async_eplb.cli import main
from async_eplb.errors import InvalidOptions
from async_eplb.report import Report, read_events, summarize
from async_eplb.report.conditions import parse_condition
from async_eplb.report.rankings import medians
from async_eplb.report.runs import runs_of
from async_eplb.report.text import in_ms, update_lines
from async_eplb.testing.sample_model import SampleModel


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log a run of eight processes."""
    return log_of_processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log two updates of four ranks that serve."""
    return log_of_serving(tmp_path_factory.mktemp("serving"))


def report_of(*logs: Path) -> Report:
    return summarize(read_events(*map(str, logs)))


def test_bytes_are_what_the_plans_say(processes: Path) -> None:
    """Sent, received, copied and committed, within and across nodes, rank to rank: planned anew from the maps."""
    (inputs, *_) = events_of(sorted(processes.iterdir()), "eplb.update.inputs_logged")
    old, new = (ExpertPlacement.from_mapping(inputs[f"{which}_physical_to_logical_map"]) for which in ("old", "new"))
    topology = EPTopology(num_ranks=8, num_nodes=2, num_local_physical_experts=2)
    nbytes = SampleModel(seed=0).expert_nbytes() + 8 + 8  # canary and checksum
    expected, copied, written = np.zeros((8, 8), dtype=np.int64), 0, 0
    for row in range(old.num_layers):
        maps = (old.physical_to_logical_map[row], new.physical_to_logical_map[row])
        for rank in range(8):
            plan = plan_layer(*maps, topology, rank)
            copied += len(plan.local_copies) * nbytes
            written += (len(plan.local_copies) + len(plan.recvs) + len(plan.fan_outs)) * nbytes
            for recv in plan.recvs:
                expected[recv.src_rank, rank] += nbytes
    log = read_events(str(processes))
    assert runs_of(log)[0].traffic().nbytes.tolist() == expected.tolist()
    (update,) = summarize(log).updates
    within = sum(int(expected[start : start + 4, start : start + 4].sum()) for start in (0, 4))
    assert update.sent_nbytes_within_node == update.received_nbytes_within_node == within
    assert update.sent_nbytes_across_nodes == update.received_nbytes_across_nodes == expected.sum() - within
    assert (update.copied_nbytes, update.committed_nbytes) == (copied, written)


def test_stage_times_are_inside_the_time_of_the_update(processes: Path) -> None:
    """A stage handles one layer at a time, so that no rank's sum is longer than its update."""
    log = read_events(str(processes))
    (update,) = summarize(log).updates
    (run,) = runs_of(log)
    for rank in range(8):
        (finished,) = events_of([processes / f"rank-{rank}.jsonl"], "eplb.update.finished")
        start = finished["monotonic_s"] - finished["duration_ms"] / 1e3
        for name in ("planned", "transferred", "committed"):
            events = events_of([processes / f"rank-{rank}.jsonl"], f"eplb.layer.{name}")
            assert sum(event["duration_ms"] for event in events) <= finished["duration_ms"]
            for event in events:
                assert start <= event["monotonic_s"] - event["duration_ms"] / 1e3 + 1e-3
                assert event["monotonic_s"] <= finished["monotonic_s"]
    assert max(update.plan_ms, update.transfer_ms, update.commit_ms) <= update.duration_ms
    assert (update.outcome, update.mode, update.num_ranks, update.num_nodes) == ("finished", "exclusive", 8, 2)
    assert run.clocks.offset_s == dict.fromkeys(range(8), 0.0)


def test_a_serving_run_shows_stalls_and_what_was_paid(serving: Path) -> None:
    """Stalls are what commits and fences took of steps, as logged; the balance is that of the decision."""
    report = report_of(serving)
    assert [update.generation for update in report.updates] == [1, 2]
    for update in report.updates:
        stalls: dict[tuple[int, int], float] = {}
        for name, key in (("eplb.layer.committed", "copy_ms"), ("eplb.fence.waited", "duration_ms")):
            for event in events_of(serving.iterdir(), name):
                if event["generation"] == update.generation:
                    at = (event["rank"], event["step"])
                    stalls[at] = stalls.get(at, 0.0) + event[key]
        assert update.mode == "serving"
        assert update.num_stalls == len(stalls)
        assert update.stall_p50_ms == pytest.approx(np.percentile(list(stalls.values()), 50))
        assert update.stall_max_ms == pytest.approx(max(stalls.values()))
        assert (update.balancedness_before, update.balancedness_after) == (0.5, 0.875)
        assert update.break_even_steps == pytest.approx(update.duration_ms / 0.5)
        assert update.num_layers == NUM_LAYERS
    assert report.faults == report.left_out == ()


def test_passes_beside_an_update_are_told_from_others(serving: Path) -> None:
    """Those of all ranks together, and both in one line: what the update cost serving. Without such events, no line."""
    report = report_of(serving)
    timed = events_of(serving.iterdir(), "eplb.passes.timed")
    others = np.concatenate(
        [np.repeat(e["times_ms"], e["num_passes_by_time"]) for e in timed if e["beside"] == "nothing"]
    )
    for update in report.updates:
        mine = [e for e in timed if e["beside"] == "update" and e["generation"] == update.generation]
        assert {event["rank"] for event in mine} == {0, 1, 2, 3}
        beside = np.concatenate([np.repeat(event["times_ms"], event["num_passes_by_time"]) for event in mine])
        assert update.num_passes_beside == len(beside) == sum(event["num_passes"] for event in mine)
        p50, p99, most = np.percentile(beside, [50, 99, 100], method="inverted_cdf")
        assert (update.pass_beside_p50_ms, update.pass_beside_p99_ms, update.pass_beside_max_ms) == (p50, p99, most)
        assert [update.pass_p50_ms, update.pass_p99_ms] == np.percentile(
            others, [50, 99], method="inverted_cdf"
        ).tolist()
        assert f"p99 {in_ms(p99)}, max {in_ms(most)}; others p50" in "\n".join(update_lines(update))
        older = replace(update, num_passes_beside=0)
        assert "passes beside it" not in "\n".join(update_lines(older))
    assert report.figures()["pass_beside_p99_ms"] == max(update.pass_beside_p99_ms for update in report.updates)


def test_passes_that_are_damaged_are_left_out(serving: Path, tmp_path: Path) -> None:
    """Counted, as all lines with a value that their key cannot have."""
    damage: dict[str, list[Any]] = {
        "times_ms": [1.0, [True], ["1"], None],
        "num_passes_by_time": [[-1], [1 << 40], [0.5], [[1]]],
    }
    for number, (key, value) in enumerate((key, value) for key, values in damage.items() for value in values):
        damaged = Path(shutil.copytree(serving, tmp_path / str(number)))
        rewrite(damaged, lambda e, k=key, v=value: {**e, k: v} if k in e else e)  # type: ignore[misc]
        report = report_of(damaged)
        assert [update.num_passes_beside for update in report.updates] == [0, 0]
        assert any("a value that its key cannot have" in line for line in report.left_out)


def test_ranks_of_other_hosts_are_put_on_one_time_line(serving: Path, tmp_path: Path) -> None:
    """Their monotonic clocks are hours apart; times come out as if they were one."""
    elsewhere = Path(shutil.copytree(serving, tmp_path / "elsewhere"))
    rewrite(elsewhere, lambda e: {**e, "monotonic_s": e["monotonic_s"] + (5000.0 if e["rank"] >= 2 else 0.0)})
    (run,) = runs_of(read_events(str(elsewhere)))
    assert run.clocks.offset_s[0] == run.clocks.offset_s[1] == 0
    assert run.clocks.offset_s[2] == pytest.approx(5000, abs=0.1)
    assert report_of(elsewhere).updates[0].start_s == pytest.approx(report_of(serving).updates[0].start_s, abs=0.1)
    assert report_of(elsewhere).faults == ()


def test_a_late_rank_of_the_same_host_keeps_its_clock(serving: Path, tmp_path: Path) -> None:
    """It hears of each update a second after the others, and that is how it is shown."""
    late = Path(shutil.copytree(serving, tmp_path / "late"))
    rewrite(
        late,
        lambda e: {**e, **{clock: e[clock] + (e["rank"] == 3) for clock in ("monotonic_s", "wall_s")}},
    )
    report = report_of(late)
    assert runs_of(read_events(str(late)))[0].clocks.offset_s[3] == 0
    assert report.clock_error_ms == 0
    assert report.lagging_ranks[0].rank == 3
    assert report.lagging_ranks[0].lag_ms == pytest.approx(1000, abs=100)


def test_a_clock_that_was_set_is_reported(serving: Path, tmp_path: Path) -> None:
    """Times stay those of the monotonic clock."""
    moved = Path(shutil.copytree(serving, tmp_path / "moved"))
    rewrite(moved, lambda e: {**e, "wall_s": e["wall_s"] + (3600.0 if e["rank"] == 1 and e["generation"] > 1 else 0)})
    report = report_of(moved)
    (fault,) = report.faults
    assert fault.startswith("the wall clock left the monotonic one by up to 3600.0 s on rank 1: ")
    assert [update.duration_ms for update in report.updates] == [u.duration_ms for u in report_of(serving).updates]


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1e6, 1e6)), min_size=1))
def test_medians_of_groups_are_those_of_numpy(pairs: list[tuple[int, float]]) -> None:
    """Of groups of any sizes, in any order."""
    keys, groups = np.unique([key for key, _ in pairs], return_inverse=True)
    values = np.array([value for _, value in pairs])
    expected = [np.median(values[groups == number]) for number in range(len(keys))]
    assert medians(groups.reshape(-1), values) == pytest.approx(expected)


def test_a_rank_that_lags_is_named(serving: Path, tmp_path: Path) -> None:
    """By how much it staged its layers after the others."""
    late = Path(shutil.copytree(serving, tmp_path / "late"))
    rewrite(
        late,
        lambda e: (
            {**e, "monotonic_s": e["monotonic_s"] + 0.05}
            if (e["event"], e["rank"]) == ("eplb.layer.transferred", 3)
            else e
        ),
    )
    (first, *_) = report_of(late).lagging_ranks
    assert (first.rank, first.num_last) == (3, 2 * NUM_LAYERS)
    assert first.lag_ms == pytest.approx(50, abs=5)


def test_the_slowest_layer_and_link_are_named(serving: Path, tmp_path: Path) -> None:
    """The layer that took a second more, and the links into the rank that it took so long on."""
    slow = Path(shutil.copytree(serving, tmp_path / "slow"))

    def change(event: dict[str, object]) -> dict[str, object]:
        here = (event["event"], event["layer"], event["rank"]) == ("eplb.layer.transferred", 1, 2)
        return {**event, "duration_ms": 1000.0} if here and event["generation"] == 1 else event

    rewrite(slow, change)
    report = report_of(slow)
    layer = report.slowest_layers[0]
    assert (layer.generation, layer.layer, layer.rank, layer.transfer_ms) == (1, 1, 2, 1000.0)
    sources = {
        source
        for event in events_of([slow / "rank-2.jsonl"], "eplb.layer.transferred")
        if (event["layer"], event["generation"]) == (1, 1)
        for source in event["received_from_ranks"]
    }
    assert sources
    named = {(link.src_rank, link.dst_rank) for link in report.slowest_links[: len(sources)]}
    assert named == {(source, 2) for source in sources}


def test_a_failed_update_names_its_error(serving: Path, tmp_path: Path) -> None:
    """The error, the rank and how many layers were committed before; an update without an end is unfinished."""
    broken = Path(shutil.copytree(serving, tmp_path / "broken"))

    def change(event: dict[str, object]) -> dict[str, object]:
        if event["event"] != "eplb.update.finished":
            return event
        if event["generation"] == 2:
            return {**event, "event": "eplb.some.thing"}
        fault = {"error": "BrokenTransport", "error_message": "cut", "committed_layers": [0, 1]}
        return {**event, "event": "eplb.update.failed", **fault}

    rewrite(broken, change)
    report = report_of(broken)
    assert [update.outcome for update in report.updates] == ["failed", "unfinished"]
    assert report.updates[0].error == "BrokenTransport: cut"
    assert report.faults[0] == "update 1 failed on rank 0 after 2 layers: BrokenTransport: cut"
    assert report.figures()["num_failed"] == 1


def test_skipped_layers_are_listed(processes: Path, serving: Path) -> None:
    """Those of a model's layers that no rank planned."""
    assert report_of(processes).updates[0].skipped_layers == ()
    log = read_events(str(serving))
    log.tables["eplb.update.started"]["num_unchanged_layers"][:] = 2
    assert summarize(log).updates[0].skipped_layers == (NUM_LAYERS, NUM_LAYERS + 1)


def test_json_holds_the_figures(serving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is unknown is null, and the rest are the report's numbers."""
    assert main(["report", str(serving), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figures = report_of(serving).figures()
    assert document["figures"] == {name: None if math.isnan(value) else value for name, value in figures.items()}
    assert len(document["updates"]) == 2


def test_the_text_names_updates_layers_links_and_ranks(serving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the figures are, with units."""
    assert main(["report", str(serving)]) == 0
    output = capsys.readouterr().out
    for wanted in (
        f"finished, serving, {SERVING.num_ranks} ranks on 2 nodes",
        "layers            3 moved, 0 skipped",
        "balancedness      0.5 before, 0.875 after",
        "slowest layers",
        "slowest links",
    ):
        assert wanted in output


def test_two_runs_are_compared(serving: Path, processes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure of both, and the ratio of the second to the first."""
    assert main(["report", "--compare", str(serving), str(processes)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (line for line in lines if line[0] == "num_updates")
    assert row == ["num_updates", "2", "1", "0.5"]
    assert main(["report", "--compare", str(serving), str(processes), "--fail-if", "num_updates == 1"]) == 1
    assert main(["report", "--compare", str(serving), str(processes), "--fail-if", "num_updates == 2"]) == 0
    assert main(["report", str(serving), "--compare", str(serving), str(processes)]) == 2


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("num_failed > 0", 0),
        ("num_updates >= 2", 1),
        ("num_updates != 2", 0),
        ("duration_ms<1e-3", 0),
        ("duration_ms > 0", 1),
    ],
)
def test_a_condition_fails_the_command(
    condition: str, status: int, serving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With status 1 and a line that says which."""
    assert main(["report", str(serving), "--fail-if", condition]) == status
    assert ("failed: " in capsys.readouterr().err) == bool(status)


def test_a_figure_that_is_not_in_the_log_fails_the_command(processes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exclusive update has no stalls: a limit on them is not kept just because nobody looked."""
    assert main(["report", str(processes), "--fail-if", "stall_p99_ms > 2"]) == 1
    assert "stall_p99_ms is not in this log" in capsys.readouterr().err


def test_the_commands_of_the_readme_do_what_they_say(
    serving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs as it is printed, and writes the files that it names."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = [
        shlex.split(line, comments=True)[3:]
        for line in re.findall(r"^ +(python -m async_eplb report .*)$", readme, flags=re.MULTILINE)
    ]
    assert len(commands) == 6
    monkeypatch.chdir(tmp_path)
    for name in ("logs", "before", "after"):
        shutil.copytree(serving, name)
    for command in commands:
        assert main(command) in ((0, 1) if "--fail-if" in command else (0,))
    written = {each for command in commands for each in command if each.endswith((".html", ".json", ".png", ".svg"))}
    assert written == {path.name for path in tmp_path.iterdir() if path.is_file()} != set()


@pytest.mark.parametrize("text", ["stall", "stall_p99_ms > fast", "no_figure > 1", "num_failed > 1.2.3", ""])
def test_what_is_no_condition_is_refused(text: str) -> None:
    """With the form, or the figures that there are."""
    with pytest.raises(InvalidOptions):
        parse_condition(text, {"stall_p99_ms": 1.0, "num_failed": 0})
