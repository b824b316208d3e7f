"""The fuzzer of inputs runs each of its targets, and what it has found is refused by name."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from async_eplb.cli import main
from async_eplb.errors import InvalidPlacement, InvalidWeightSource, UnreadableLog
from async_eplb.events.schema import LayerPlanned, UpdateFailed, UpdateStarted
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.weight_source import INDEX, SafetensorsSource
from async_eplb.report import read_events, reading
from async_eplb.transport.copy_engine.peer_weights import Offer

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "fuzzing")]


def test_every_target_runs(tmp_path: Path) -> None:
    """So many inputs each, and none is answered with anything but a typed error."""
    command = [*SCRIPT, "--runs", "300", "--seed", "1", "--found", str(tmp_path / "found")]
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    names = re.findall(r"^([a-z-]+): 300 inputs taken or refused", outcome.stdout, re.MULTILINE)
    listed = subprocess.run([*SCRIPT, "--help"], check=True, capture_output=True, text=True).stdout
    assert names == re.findall(
        r"^  ([a-z-]+)  +\S", listed.partition("targets:")[2].partition("positional")[0], re.MULTILINE
    )
    assert len(names) == len(set(names)) >= 12
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("number", [-5, 1 << 63, True, 1.5, "2", [2]], ids=repr)
def test_a_number_of_experts_that_no_model_has(number: object) -> None:
    """It would size arrays: refused before any is made."""
    with pytest.raises(InvalidPlacement, match="num_logical_experts"):
        ExpertPlacement.load(json.dumps({"physical_to_logical_map": [[-1]], "num_logical_experts": number}))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, 2, dtype=torch.bfloat16), torch.eye(2).to_sparse(), torch.zeros(1, 2, requires_grad=True)],
    ids=["bfloat16", "sparse", "with gradients"],
)
def test_a_tensor_that_is_no_table(tensor: torch.Tensor, tmp_path: Path) -> None:
    """NumPy cannot take it."""
    torch.save({"physical_to_logical_map": tensor}, tmp_path / "new.pt")
    with pytest.raises(InvalidPlacement):
        ExpertPlacement.load(tmp_path / "new.pt")


def line_of(name: str, **values: Any) -> bytes:
    row = {"event": name, "schema_version": 1, "run_id": "a", "generation": 1, "rank": 0, "step": 1, "layer": 0}
    row |= {"wall_s": 1.0, "monotonic_s": 1.0, "duration_ms": 1.0, "mode": "serving", "num_ranks": 1, "num_layers": 1}
    row |= {"num_nodes": 1, "num_unchanged_layers": 0}
    row |= {"error": "OSError", "error_message": "", "committed_layers": []}
    return json.dumps(row | values).encode()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (UpdateStarted.name, {"num_ranks": float("inf")}),
        (UpdateStarted.name, {"num_ranks": 10**12}),
        (UpdateFailed.name, {"duration_ms": float("nan")}),
        (UpdateFailed.name, {"duration_ms": 10**400}),
        (LayerPlanned.name, {"duration_ms": 10**400}),
        (LayerPlanned.name, {"rank": -1}),
    ],
)
def test_a_number_that_no_rank_wrote_is_left_out(
    name: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without orjson, which refuses some by itself."""
    monkeypatch.setattr(reading, "loads", json.loads)
    (tmp_path / "log.jsonl").write_bytes(line_of(name, **values) + b"\n")
    with pytest.raises(UnreadableLog, match="a value that its key cannot have"):
        read_events(str(tmp_path / "log.jsonl"))


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "with a null"])
def test_a_name_that_no_file_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and status 2."""
    assert main(["report", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["simulate", "--json", f"{name}/a.json"]) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"0.0": 1}}', "[" * 100_000])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    """It is refused when the checkpoint is opened."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InvalidWeightSource):
        SafetensorsSource(tmp_path, ["{layer}.{expert}"])


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    """With an index, when an expert is read; without, when it is opened."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InvalidWeightSource):
        SafetensorsSource(tmp_path, ["{layer}.{expert}"])
    (tmp_path / INDEX).write_text('{"weight_map": {"0.0": "model.safetensors"}}')
    with pytest.raises(InvalidWeightSource):
        SafetensorsSource(tmp_path, ["{layer}.{expert}"]).load(0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        '{"host": "a", "host_name": "a", "handles": [], "slots": {"0": [[0, 0, 64]]}}',
        '{"host": "a", "host_name": "a", "handles": ["xy"], "slots": {}}',
    ],
)
def test_an_offer_that_is_none(text: str) -> None:
    """It ends as any mapping that fails does: on every rank, with IpcUnavailable."""
    with pytest.raises(RuntimeError, match="offer makes no sense"):
        Offer.from_json(text)
