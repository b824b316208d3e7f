"""Placements in files: those of engines are read as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from async_eplb import ExpertPlacement
from async_eplb.errors import InvalidPlacement
from async_eplb.testing.sample_model import random_placement

ROWS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
"""DeepSeek's published example: 12 experts in 16 slots of 8 GPUs."""

EXPECTED = ExpertPlacement.from_mapping(ROWS)
NUM_RANKS = 8


def expert_maps(rows: list[list[int]], num_ranks: int) -> torch.Tensor:
    """Return the local slot of each expert, -1 without one: ``[layers, ranks, all slots]``, as vLLM's users do."""
    placed = torch.tensor(rows).view(len(rows), num_ranks, -1)
    maps = torch.full((len(rows), num_ranks, len(rows[0])), -1, dtype=torch.int32)
    for layer in range(len(rows)):
        for rank in range(num_ranks):
            maps[layer, rank, placed[layer, rank]] = torch.arange(placed.shape[2], dtype=torch.int32)
    return maps


def ascend(rows: list[list[int]], num_ranks: int, *, first: int = 0) -> dict[str, Any]:
    """Return vllm-ascend's expert map."""
    width = len(rows[0]) // num_ranks
    return {
        "moe_layer_count": len(rows),
        "layer_list": [
            {
                "layer_id": first + layer,
                "device_count": num_ranks,
                "device_list": [
                    {"device_id": rank, "device_expert": row[rank * width : (rank + 1) * width]}
                    for rank in range(num_ranks)
                ],
            }
            for layer, row in enumerate(rows)
        ],
    }


def tensorrt_llm(rows: list[list[int]], *, first: int = 3) -> dict[str, Any]:
    """Return TensorRT-LLM's configuration of its load balancer."""
    assignments = {first + layer: row for layer, row in enumerate(rows)}
    return {"initial_global_assignments": assignments, "num_slots": len(rows[0]), "layer_updates_per_iter": 0}


def as_json(document: object) -> Callable[[Path], object]:
    """Return what writes a document as JSON."""
    return lambda path: path.write_text(json.dumps(document))


def as_yaml(document: object) -> Callable[[Path], object]:
    """Return what writes a document as TensorRT-LLM does."""
    return lambda path: path.write_text(yaml.dump(document, default_flow_style=None, width=10**6))


def as_tensors(document: object) -> Callable[[Path], object]:
    """Return what writes a document with torch."""
    return lambda path: torch.save(document, path)


VLLM_MAPPING = {"record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 4, "num_slots": 16}

FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "SGLang, JSON": ("location.json", as_json({"physical_to_logical_map": ROWS})),
    "SGLang, tensor": ("location.pt", as_tensors({"physical_to_logical_map": torch.tensor(ROWS)})),
    "DeepSeek": ("phy2log.pt", as_tensors(torch.tensor(ROWS))),
    "DeepSeek, by ranks": ("phy2log.pt", as_tensors(torch.tensor(ROWS).view(2, NUM_RANKS, -1))),
    "vLLM, map": ("map.pth", as_tensors(torch.tensor(ROWS, dtype=torch.int32))),
    "vLLM, expert maps": ("expert_map.pth", as_tensors(expert_maps(ROWS, NUM_RANKS))),
    "vLLM, lines": (
        "mapping.jsonl",
        as_json({**VLLM_MAPPING, "initial_global_assignments": {str(layer): row for layer, row in enumerate(ROWS)}}),
    ),
    "vllm-ascend": ("expert_map.json", as_json(ascend(ROWS, NUM_RANKS, first=3))),
    "TensorRT-LLM": ("moe_load_balancer.yaml", as_yaml(tensorrt_llm(ROWS))),
    "TensorRT-LLM, .yml": ("moe_load_balancer.YML", as_yaml(tensorrt_llm(ROWS))),
    "TensorRT-LLM, in another order": (
        "config.yaml",
        as_yaml({"initial_global_assignments": {10: ROWS[1], 9: ROWS[0]}, "num_slots": 16}),
    ),
    "a table": ("rows.json", as_json(ROWS)),
}


@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_files_of_engines(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    """One placement, as each of them has it."""
    write(tmp_path / name)
    assert ExpertPlacement.load(tmp_path / name) == EXPECTED


def test_rows_that_are_one_object_in_yaml(tmp_path: Path) -> None:
    """Its dumper writes an alias for the second."""
    row = [0, 1, 1, 0]
    (tmp_path / "a.yaml").write_text(yaml.dump(tensorrt_llm([row, row, row])))
    assert "*id" in (tmp_path / "a.yaml").read_text()
    assert ExpertPlacement.load(tmp_path / "a.yaml") == ExpertPlacement.from_mapping([row] * 3)


def test_aliases_do_not_blow_up(tmp_path: Path) -> None:
    """A small file of nested aliases stands for more numbers than fit any memory; it is refused at once."""
    levels = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    for key in ("initial_global_assignments: {0: *a11}", "physical_to_logical_map: *a11", "layer_list: *a11"):
        (tmp_path / "a.yaml").write_text("\n".join([*levels, key]))
        with pytest.raises(InvalidPlacement):
            ExpertPlacement.load(tmp_path / "a.yaml")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000), st.data())
def test_every_form_gives_the_same_placement(
    tmp_path_factory: pytest.TempPathFactory, layers: int, ranks: int, width: int, seed: int, data: st.DataObject
) -> None:
    """For any placement; what cannot say how many experts there are is told."""
    experts = data.draw(st.integers(1, ranks * width))
    placement = random_placement(np.random.default_rng(seed), layers, ranks * width, experts)
    rows = placement.physical_to_logical_map.tolist()
    distinct = all(len(set(row[r * width : (r + 1) * width])) == width for row in rows for r in range(ranks))
    forms = {
        "a.json": as_json(ascend(rows, ranks)),
        "b.json": as_json(rows),
        "c.json": as_json(tensorrt_llm(rows)),
        "d.json": as_json({"physical_to_logical_map": rows}),
        "e.pt": as_tensors(torch.tensor(rows).view(layers, ranks, width)),
    }
    if distinct and ranks > 1:
        forms["f.pth"] = as_tensors(expert_maps(rows, ranks))
    folder = tmp_path_factory.mktemp("placements")
    for name, write in forms.items():
        write(folder / name)
        assert ExpertPlacement.load(folder / name, experts) == placement


def test_devices_with_fewer_experts_have_empty_slots(tmp_path: Path) -> None:
    """So that physical experts keep their numbers."""
    document = ascend([[0, 1, 2, 3, 4, 5]], 2)
    del document["layer_list"][0]["device_list"][0]["device_expert"][2]
    as_json(document)(tmp_path / "map.json")
    placement = ExpertPlacement.load(tmp_path / "map.json")
    assert placement.physical_to_logical_map.tolist() == [[0, 1, -1, 3, 4, 5]]


def other(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return vllm-ascend's map with something changed in it."""
    document = ascend([[0, 1, 1, 0], [1, 0, 0, 1]], 2)
    change(document)
    return document


WRONG: dict[str, tuple[object, str]] = {
    "layers in another order": (other(lambda d: d["layer_list"].reverse()), "not in ascending order of layer_id"),
    "a layer twice": (other(lambda d: d["layer_list"][1].update(layer_id=0)), "not in ascending order of layer_id"),
    "devices in another order": (
        other(lambda d: d["layer_list"][0]["device_list"].reverse()),
        "not in ascending order of device_id",
    ),
    "a layer too few": (other(lambda d: d["layer_list"].pop()), "has 1 entries, and the file says 2"),
    "a device too few": (other(lambda d: d["layer_list"][1]["device_list"].pop()), "has 1 entries"),
    "layers that are none": ({"layer_list": [1, 2]}, "list of objects"),
    "no list": ({"layer_list": 3}, "list of objects"),
    "no devices": ({"layer_list": [{"device_list": []}]}, "shape"),
    "experts that are none": (other(lambda d: d["layer_list"][0]["device_list"][0].update(device_expert=3)), "read"),
    "fewer slots in a layer": (other(lambda d: [e["device_list"].pop() for e in d["layer_list"][:1]]), "has 1 entries"),
    "assignments that are a list": ({"initial_global_assignments": [[0, 1]]}, "must be an object"),
    "no assignments": ({"initial_global_assignments": {}}, "must be an object"),
    "assignments of text": ({"initial_global_assignments": {"0": ["a"]}}, "no list of logical experts"),
    "assignments of lists": ({"initial_global_assignments": {"0": [[0], [1]]}}, "no list of logical experts"),
    "assignments of numbers": ({"initial_global_assignments": {"0": 3}}, "no list of logical experts"),
    "layers that have names": ({"initial_global_assignments": {"first": [0]}}, "cannot be read"),
    "unequal layers": ({"initial_global_assignments": {"0": [0], "1": [0, 1]}}, "not a table"),
    "a load alone": ([[90, 132, 40]], "if it is a load, ExpertLoad.load reads it"),
    "floats alone": ([[0.5, 1.0]], "must hold integers"),
    "four axes": ([[[[0]]]], "in 2 axes"),
    "two experts in a slot": ([[[0, 0, -1]]], "two experts in one slot"),
    "more slots than experts": ([[[5, 0, -1]]], "6 slots for 3 experts"),
    "a later version": ({"physical_to_logical_map": [[0]], "version": 2}, "versions up to 1"),
}


@pytest.mark.parametrize(("document", "message"), WRONG.values(), ids=WRONG)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, document: object, message: str) -> None:
    """By what is wrong with them."""
    as_json(document)(tmp_path / "map.json")
    with pytest.raises(InvalidPlacement, match=message):
        ExpertPlacement.load(tmp_path / "map.json")
