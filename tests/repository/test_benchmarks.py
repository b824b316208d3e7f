"""The benchmarks run and write down what they measured."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the launcher in this process, which need not import torch again; return its exit status."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "benchmarks"), run_name="__main__")
    return ended.value.code


def test_the_pipeline_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """Both depths and their ratio, with each stage as the slowest, and the machine."""
    file = tmp_path / "figures.json"
    small = ["--layers", "2", "--stage-ms", "1", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "pipeline", *small], check=True)
    document = json.loads(file.read_text())
    assert document["benchmark"] == "pipeline"
    assert document["machine"]["cores"] >= 1
    figures = document["figures"]
    for stage in ("plan", "transfer", "commit"):
        overlapped, alone = (figures[f"{stage}_slowest_depth_{depth}_ms"] for depth in (2, 1))
        assert figures[f"{stage}_slowest_depth_1_over_depth_2"] == alone / overlapped
        assert figures[f"{stage}_slowest_depth_2_over_slowest_stage"] == overlapped / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["commit", "gpu-serving", "multi-gpu", "transports"])
def test_a_benchmark_of_the_gpu_says_what_it_needs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a CUDA device it measures nothing and exits with 2."""
    assert launched(monkeypatch, name) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "needs a CUDA device" in output.err


def test_without_a_name_the_launcher_lists_what_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of each benchmark and its first line."""
    assert launched(monkeypatch) == 0
    assert "pipeline How much the stages overlap" in " ".join(capsys.readouterr().out.split())


def test_the_policy_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """Receives, peaks and times of a full replan and of the incremental policy, with and without groups."""
    file = tmp_path / "figures.json"
    small = ["--layers", "3", "--seeds", "1", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "policy", *small], check=True)
    figures = json.loads(file.read_text())["figures"]
    for drift in ("global_drift_10", "global_drift_30", "grouped_drift_10", "grouped_drift_30"):
        assert figures[f"{drift}_incremental_receives"] < figures[f"{drift}_replan_receives"] <= 1
        assert 1 <= figures[f"{drift}_incremental_peak"] <= figures[f"{drift}_incremental_worst_peak"]
        assert figures[f"{drift}_incremental_cpu_ms"] > 0
    assert figures["global_replan_cpu_ms"] > 0


def test_the_serving_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """Step times and stalls of all four ways, and their ratios; all updates were over before the last pass."""
    file = tmp_path / "figures.json"
    small = [
        "--layers",
        "2",
        "--expert-kb",
        "64",
        "--passes",
        "60",
        "--passes-per-layer",
        "2",
        "--updates",
        "2",
        "--runs",
        "1",
        "--json",
    ]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "serving", *small, str(file)], check=True)
    figures = json.loads(file.read_text())["figures"]
    for way in ("none", "ours", "blocking", "scratch"):
        assert 0 < figures[f"{way}_p50_ms"] <= figures[f"{way}_p99_ms"] <= figures[f"{way}_max_ms"]
        assert 0 < figures[f"{way}_stall_ms"] <= figures[f"{way}_max_ms"]
    assert figures["ours_p99_over_scratch_p99"] == figures["ours_p99_ms"] / figures["scratch_p99_ms"]
    assert figures["blocking_stall_over_ours_stall"] == figures["blocking_stall_ms"] / figures["ours_stall_ms"]
    assert figures["ours_updates_within_passes"] == 2


def test_the_events_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """The cost of each event to each listener, and the worst of them."""
    file = tmp_path / "figures.json"
    small = ["--number", "50", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "events", *small], check=True)
    figures = json.loads(file.read_text())["figures"]
    for listener in ("nobody", "nobody_by_default", "metrics", "json"):
        costs = [value for name, value in figures.items() if re.fullmatch(f"{listener}_(?!by_|worst).*_us", name)]
        assert len(costs) == 6
        assert figures[f"{listener}_worst_us"] == max(costs) > 0
    assert figures["json_num_dropped"] == 0


def test_the_report_benchmark_reads_what_it_made(tmp_path: Path) -> None:
    """All events, and all bytes of the made log."""
    file = tmp_path / "figures.json"
    small = ["--ranks", "16", "--layers", "3", "--updates", "2", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "report", *small], check=True)
    figures = json.loads(file.read_text())["figures"]
    assert figures["num_events"] == 16 * 2 * (3 * 3 + 2)
    assert figures["num_updates"] == 2
    assert figures["bytes_add_up"] is True


def test_the_planner_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """Times of both methods, whose plans it has found equal, and what relabelling and relays save."""
    file = tmp_path / "figures.json"
    small = ["--layers", "2", "--seeds", "1", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "planner", *small], check=True)
    figures = json.loads(file.read_text())["figures"]
    for shape in ("288_8", "288_32", "320_320", "1024_128"):
        assert figures[f"{shape}_columns_ms"] > 0
        assert (
            figures[f"{shape}_plan_layer_over_plan"] == figures[f"{shape}_plan_layer_ms"] / figures[f"{shape}_plan_ms"]
        )
    for shape in ("288_8", "288_32"):
        assert figures[f"{shape}_relabel_receives"] <= figures[f"{shape}_replan_receives"] <= 1
        for target in ("replan", "relabel", "incremental"):
            relayed = figures[f"{shape}_{target}_relayed_crossings"]
            assert relayed <= figures[f"{shape}_{target}_chunked_crossings"]
            assert figures[f"288_8_{target}_balanced_busiest"] <= figures[f"288_8_{target}_chunked_busiest"]


def test_the_verify_benchmark_writes_its_figures(tmp_path: Path) -> None:
    """Times of a layer in each mode, and of the checksum against both others."""
    file = tmp_path / "figures.json"
    small = ["--slots", "3", "--hidden", "256", "--intermediate", "128", "--runs", "3", "--json", str(file)]
    subprocess.run([sys.executable, ROOT / "scripts" / "benchmarks", "verify", *small], check=True)
    figures = json.loads(file.read_text())["figures"]
    assert 0 < figures["off_layer_us"] < figures["canary_layer_us"] < figures["checksum_layer_us"]
    for way in ("checksum", "torch_checksum", "flat_copy"):
        assert figures[f"{way}_us"] > 0
        assert figures[f"{way}_gb_s"] > 0
    assert figures["checksum_over_flat_copy"] == figures["checksum_us"] / figures["flat_copy_us"]
