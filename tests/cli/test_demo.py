"""The demo on the command line: what it runs, what it refuses, how it is interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from async_eplb import ExpertPlacement
from async_eplb.cli import main

VERDICT = "Every byte of every slot on every rank is right"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a placement of 2 layers, 4 experts and 6 replicas."""
    path = tmp_path / "placement.json"
    ExpertPlacement.from_mapping([[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 1, 0]]).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["--nodes", "4"], "12 experts in 16 slots, 8 ranks on 4 nodes, gloo"),
        (["--ranks", "3", "--layers", "2"], "16 experts in 24 slots, 3 ranks on 1 node, gloo"),
        (["--layers", "1"], "16 experts in 24 slots, 4 ranks on 2 nodes, gloo"),
        (["--experts", "8"], "8 experts in 12 slots, 4 ranks on 2 nodes, gloo"),
        (["--replicas", "16"], "16 experts in 16 slots, 4 ranks on 2 nodes, gloo"),
    ],
)
def test_what_the_options_ask_for_is_run(arguments: list[str], title: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The published example unless a shape is asked for; the title says what ran."""
    assert main(["demo", "--backend", "gloo", *arguments]) == 0
    output = capsys.readouterr().out
    assert output.startswith(title)
    assert VERDICT in output


def test_a_placement_from_a_file_is_run(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that agree with it are welcome."""
    shape = ["--ranks", "2", "--layers", "2", "--experts", "4", "--replicas", "6"]
    assert main(["demo", "--backend", "gloo", "--placement", str(saved), *shape]) == 0
    assert capsys.readouterr().out.startswith("4 experts in 6 slots, 2 ranks on 2 nodes")


@pytest.mark.parametrize("option", ["--layers", "--experts", "--replicas"])
def test_options_that_contradict_the_file_are_refused(
    option: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the option and what the file has."""
    assert main(["demo", "--placement", str(saved), "--ranks", "2", option, "5"]) == 2
    assert f"{option} is 5, but the placement has" in capsys.readouterr().err


def test_each_rank_writes_its_log(tmp_path: Path) -> None:
    """One file of JSON lines for each rank."""
    assert main(["demo", "--ranks", "2", "--layers", "2", "--log-dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--replicas", "5", "--ranks", "2"],
        ["--replicas", "18"],
        ["--placement", "none.json"],
        ["--ranks", "4", "--nodes", "3"],
        ["--nodes", "3"],
        ["--log-dir", __file__],
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One line on standard error and status 2."""
    assert main(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("async_eplb: ")


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--ranks", "two"], ["--seed", "-1"], ["--backend", "mpi"]])
def test_what_is_no_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The usage, the option's name and status 2."""
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    assert f"error: argument {arguments[0]}: " in capsys.readouterr().err


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """And says what runs without any, what the exit status means, and shows examples."""
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for option in ("ranks", "nodes", "layers", "experts", "replicas", "placement", "seed", "backend", "log-dir"):
        assert f"--{option} " in output
    assert "DeepSeek" in output
    assert "Exit status" in output
    assert "examples:" in output


@pytest.mark.parametrize(
    "sign", ["async-eplb-*", "logs/rank-0.jsonl"], ids=["while processes start", "while they work"]
)
def test_an_interrupt_leaves_nothing_behind(sign: str, tmp_path: Path) -> None:
    """Ctrl-C ends all processes: one line, no traceback, status 130."""
    allow_interrupts = ["env", "--default-signal=INT"]  # a shell starts background jobs with SIGINT ignored
    options = ["--ranks", "4", "--layers", "200", "--log-dir", str(tmp_path / "logs")]
    demo = subprocess.Popen(
        [*allow_interrupts, sys.executable, "-m", "async_eplb", "demo", *options],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob(sign)) and demo.poll() is None:
        time.sleep(0.01)
    os.killpg(demo.pid, signal.SIGINT)
    _, errors = demo.communicate(timeout=60)  # returns when the last process has closed its end
    assert demo.returncode == 130
    assert errors.endswith("async_eplb: interrupted\n")
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("async-eplb-*"))
