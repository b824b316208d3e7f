"""The table of all code that reads bytes from outside, with seeds and words to make up more bytes from."""

import contextlib
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from async_eplb.agreement.ballot import Ballot, Status
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import BrokenControlGroup, EplbError
from async_eplb.events.schema import EVENTS
from async_eplb.files.loads import LOADS
from async_eplb.files.placements import PLACEMENTS
from async_eplb.fuzz import Scenario, scenario_for
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.weight_source import INDEX, SafetensorsSource
from async_eplb.report import read_events, summarize
from async_eplb.report.conditions import parse_condition
from async_eplb.report.text import report_lines
from async_eplb.transport.copy_engine.peer_weights import Offer
from fuzzing import command_line, live_weights

_JSON_WORDS = (b"null", b"true", b"-1", b"1e999", b"9223372036854775808", b"[[", b"]]", b'{"', b'":', b"\\ud800")


@dataclass(frozen=True, slots=True)
class Target:
    """One function that reads bytes from outside.

    :param reads: what it reads, for the help text
    :param feed: reads bytes; runs in an empty folder
    :param seeds: returns bytes to begin with
    :param words: byte strings to insert
    :param refusals: errors that it may raise besides an ``EplbError``
    :param is_json: it reads lines of JSON, in which values are changed as well as bytes
    """

    reads: str
    feed: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[bytes, ...] = ()
    refusals: tuple[type[BaseException], ...] = ()
    is_json: bool = False

    def guarded(self) -> Callable[[bytes], None]:
        """Return ``feed`` without its output and its refusals: whatever it raises is a fault."""

        def run(data: bytes) -> None:
            nowhere = io.StringIO()
            with (
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
                contextlib.suppress(EplbError, *self.refusals),
            ):
                self.feed(data)

        return run


def _use(placement: ExpertPlacement) -> None:
    """Call the methods of an accepted placement that an update calls."""
    placement.unplaced()
    placement.digest()
    assert placement.physical_to_logical_map.max(initial=-1) < placement.num_logical_experts


def _read_both(source: str | Path) -> None:
    """Read a placement and a load from one source, whether or not the other was refused."""
    with contextlib.suppress(EplbError):
        _use(ExpertPlacement.load(source))
    with contextlib.suppress(EplbError):
        load = ExpertLoad.load(source)
        assert (load.tokens_per_step() >= 0).all()
        load.save("again.npz")
        assert ExpertLoad.load("again.npz") == load


def _read_named(name: str) -> Callable[[bytes], None]:
    """Return what reads a file of this name."""

    def read(data: bytes) -> None:
        Path(name).write_bytes(data)
        _read_both(Path(name))

    return read


def _read_document(data: bytes) -> None:
    """Read a document from a file and inline."""
    _read_named("document.json")(data)
    _read_both("{" + data.decode(errors="replace").lstrip().removeprefix("{"))


def _documents() -> list[bytes]:
    device = {"device_id": 0, "device_expert": [0, 1]}
    counts = {"expert_load": [[1, 2, 3]], "p2l_map": [[0, 1, -1]]}
    documents: list[Any] = [
        {"physical_to_logical_map": [[0, 1, -1], [1, 0, 1]], "num_logical_experts": 2, "version": 1},
        {"logical_count": [[1, 2, 3]]},
        {"logical_count": [[[1, 2.5], [3, 4]]]},
        {"initial_global_assignments": {"3": [0, 1, 1], "4": [1, 0, 0]}, "num_slots": 3},
        {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 1, "device_list": [device]}]},
        {"axes": ["stages", "layers", "experts"], "num_steps": [2], "phase": "a", "tokens": [[[1, 2]]]},
        {"records": [_record()], "last_physical_to_logical_map": [[0, 1, 1]]},
        counts,
        [[0, 1], [1, 0]],
        [[[0, -1, 1], [-1, 0, -1]]],
        [counts, counts],
    ]
    return [json.dumps(document).encode() for document in documents]


def _record() -> dict[str, Any]:
    return {"forward_pass_id": 1, "rank": 0, "global_physical_count": [[1, 2, 3]]}


def _lines() -> list[bytes]:
    return [b"\n".join(_documents()[7:9]), _documents()[3] + b"\n"]


def _tensor_files() -> list[bytes]:
    count = torch.ones(1, 3, dtype=torch.int32)
    contents: list[Any] = [
        {"physical_to_logical_map": torch.arange(4).view(1, 4)},
        {"physical_to_logical_map": torch.zeros(1, 2, dtype=torch.bfloat16)},
        {"logical_count": torch.ones(1, 2)},
        {"records": [_record() | {"global_physical_count": count}], "last_physical_to_logical_map": count - 1},
        torch.tensor([[[0, -1], [-1, 0]]]),
    ]
    files = []
    for content in contents:
        for new_format in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=new_format)
            files.append(buffer.getvalue())
    return files


def _array_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        load, maps = Path(folder, "load.npz"), Path(folder, "maps.npz")
        ExpertLoad.from_counts([[1, 2]], phase="a").save(load)
        np.savez(maps, physical_to_logical_map=np.array([[0, 1]]))
        return [load.read_bytes(), maps.read_bytes()]


def _yaml_files() -> list[bytes]:
    return [
        b"initial_global_assignments:\n  3: [0, 1, 1]\n  4: [1, 0, 0]\nnum_slots: 3\nlayer_updates_per_iter: 0\n",
        b"initial_global_assignments: {0: &a [0, 1], 1: *a}\n",
    ]


def _read_log(data: bytes) -> None:
    path = Path("log.jsonl")
    path.write_bytes(data)
    report = summarize(read_events(str(path)))
    report_lines(report)
    json.dumps(report.to_json())


def _read_packed_log(data: bytes) -> None:
    """Report on bytes that begin as a gzip file does, packed or not."""
    for content in (b"\x1f\x8b" + data[2:], gzip.compress(data, 1)):
        with contextlib.suppress(EplbError):
            _read_log(content)


def _log_lines() -> list[bytes]:
    lines = []
    for event in EVENTS:
        row: dict[str, Any] = {"event": event.name, "schema_version": 1, "run_id": "a", "level": "info"}
        row |= {"wall_s": 1.0, "monotonic_s": 1.0}
        for name, kind in event.__annotations__.items():
            row.setdefault(name, _example(str(kind)))
        row |= {"generation": 1, "rank": 0, "step": 1, "layer": 0, "num_ranks": 1, "num_layers": 1, "num_nodes": 1}
        lines.append(json.dumps(row).encode() + b"\n")
    whole = b"".join(lines)
    return [whole, gzip.compress(whole), *lines]


def _example(kind: str) -> object:
    for word, value in (("tuple", [0]), ("list", [0]), ("bool", True), ("int", 1), ("float", 1.0)):
        if word in kind:
            return value
    return "a"


def _receive_ballots(data: bytes) -> None:
    """Receive bytes as ballots of another rank: 8 bytes a number, as many numbers a row as a ballot has."""
    numbers = [int.from_bytes(data[start : start + 8], "little", signed=True) for start in range(0, len(data), 8)]
    size = Ballot.size()
    rows = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    shared = SharedAgreement(Agreement())
    shared.begin(Mode.SERVING, digest=1, total=3, window=2, failed=False)
    for row in rows:
        shared.count(staged=1)
        if not shared.receive([shared.ballot(), row]):
            assert isinstance(shared.faults.lost, BrokenControlGroup) or shared.faults.gone
            return
        with contextlib.suppress(EplbError):
            shared.try_pass(0)


def _ballots() -> list[bytes]:
    def row(**values: Any) -> bytes:
        ballot = {
            "generation": 1,
            "digest": 1,
            "staged": 1,
            "launchable": 1,
            "finished": 0,
            "fence": 0,
            "status": Status.OK,
            "step": 0,
            "standing": 0,
            "demanded": 0,
        }
        return b"".join(int(number).to_bytes(8, "little") for number in Ballot(**(ballot | values)).to_row())

    return [row() + row(staged=2), *(row(status=status) for status in Status), row()[:-8]]


def _read_offer(data: bytes) -> None:
    Offer.from_json(data.decode(errors="replace"))


def _offers() -> list[bytes]:
    return [Offer("host", "name", ["ab"], {0: [[(0, 0), (0, 64)]]}, "cells").to_json().encode()]


def _read_index(data: bytes) -> None:
    Path(INDEX).write_bytes(data)
    Path("model.safetensors").write_bytes(save_safetensors({"0.0": torch.zeros(2)}))
    SafetensorsSource(".", ["{layer}.{expert}"]).load(0, 0)


def _indexes() -> list[bytes]:
    return [json.dumps({"weight_map": {"0.0": "model.safetensors"}}).encode()]


def _read_checkpoint(data: bytes) -> None:
    Path("model.safetensors").write_bytes(data)
    SafetensorsSource(".", ["{layer}.{expert}"]).load(0, 0)


def _checkpoints() -> list[bytes]:
    return [save_safetensors({"0.0": torch.zeros(2)})]


def _read_scenario(data: bytes) -> None:
    Scenario.from_json(data.decode(errors="replace"))


def _scenarios() -> list[bytes]:
    return [scenario_for(seed).to_json().encode() for seed in range(4)]


def _read_condition(data: bytes) -> None:
    figures = {"num_failed": 1.0}
    parse_condition(data.decode(errors="replace"), figures).broken_by(figures)


TARGETS = {
    "document": Target(
        "placements and loads as JSON, inline and in files",
        _read_document,
        _documents,
        tuple(f'"{key}"'.encode() for forms in (PLACEMENTS, LOADS) for key in forms.by_key) + _JSON_WORDS,
        is_json=True,
    ),
    "lines": Target(
        "the same as lines of JSON", _read_named("a.jsonl"), _lines, (b'"expert_load"', *_JSON_WORDS), is_json=True
    ),
    "tensors": Target("the same as .pt files", _read_named("document.pt"), _tensor_files),
    "arrays": Target("the same as .npz files", _read_named("a.npz"), _array_files),
    "yaml": Target(
        "placements as YAML", _read_named("a.yaml"), _yaml_files, (b"&a ", b"*a", b"!!", b"? ", b"- ", b"{")
    ),
    "log": Target("logs that are reported on", _read_log, _log_lines, _JSON_WORDS, is_json=True),
    "gzip": Target("logs that are packed, or nearly so", _read_packed_log, lambda: _log_lines()[1:2]),
    "ballots": Target("ballots of another rank", _receive_ballots, _ballots),
    "offer": Target(
        "offers of another rank's memory", _read_offer, _offers, _JSON_WORDS, (RuntimeError,), is_json=True
    ),
    "index": Target("indexes of safetensors files", _read_index, _indexes, _JSON_WORDS, is_json=True),
    "checkpoint": Target("safetensors files", _read_checkpoint, _checkpoints, _JSON_WORDS),
    "scenario": Target("worlds to simulate", _read_scenario, _scenarios, _JSON_WORDS, (ValueError,), is_json=True),
    "condition": Target("conditions on figures", _read_condition, lambda: [b"num_failed > 2", b"num_failed == -1.5e3"]),
    "weights": Target(
        "live weights: rows, layouts, dtypes and kinds of tensors",
        live_weights.feed,
        live_weights.seeds,
        live_weights.WORDS,
        (ValueError,),
        is_json=True,
    ),
    "command-line": Target("arguments, one a line", command_line.feed, lambda: command_line.SEEDS, command_line.WORDS),
}
