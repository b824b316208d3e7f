"""Topologies and placements: what is accepted, refused, saved and loaded."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import InvalidPlacement, InvalidTopology
from async_eplb.testing.sample_model import random_placement


@pytest.mark.parametrize("shape", [(0, 1, 1), (4, 3, 1), (2, 1, 0), (2, -1, 1)])
def test_impossible_topologies_are_refused(shape: tuple[int, int, int]) -> None:
    """Numbers are positive and nodes have equally many ranks."""
    with pytest.raises(InvalidTopology):
        EPTopology(*shape)


def test_slots_that_do_not_divide_are_refused() -> None:
    """Every rank has the same number of slots."""
    with pytest.raises(InvalidTopology, match="do not divide"):
        EPTopology.for_physical_experts(10, num_ranks=4, num_nodes=2)


def test_trivial_placement() -> None:
    """Physical expert i holds logical expert i modulo their number."""
    placement = ExpertPlacement.trivial(2, 5, 3)
    assert placement.physical_to_logical_map.tolist() == [[0, 1, 2, 0, 1]] * 2


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_saved_placement_loads_equal(tmp_path: Path, suffix: str) -> None:
    """Both file formats keep everything."""
    placement = random_placement(np.random.default_rng(0), 3, 12, 8, num_empty=2)
    placement.save(tmp_path / f"placement{suffix}")
    assert ExpertPlacement.load(tmp_path / f"placement{suffix}") == placement


@pytest.mark.parametrize("maps", [[[1, 0]], np.array([[1, 0]]), torch.tensor([[1, 0]]), ((1, 0),)])
def test_mappings_of_any_kind(maps: object) -> None:
    """Nested sequences, arrays and tensors are alike."""
    assert ExpertPlacement.from_mapping(maps, 2).physical_to_logical_map.tolist() == [[1, 0]]


def test_inline_json_loads() -> None:
    """A placement may be given in place of a file name."""
    assert ExpertPlacement.load('{"physical_to_logical_map": [[0, 1]]}').num_logical_experts == 2


@pytest.mark.parametrize(
    "source",
    [
        "{",
        "[]",
        '{"physical_to_logical_map": [[0], [1, 2]]}',
        '{"physical_to_logical_map": [0, 1]}',
        '{"physical_to_logical_map": [[0.5]]}',
        '{"physical_to_logical_map": [["a"]]}',
        '{"physical_to_logical_map": [[99999999999]]}',
        '{"physical_to_logical_map": [[-2]]}',
        '{"logical_count": [[1, 2]]}',
        "missing.json",
        "missing.pt",
        "placement.yaml",
    ],
)
def test_unreadable_placements_are_refused(source: str) -> None:
    """Any malformed file raises an error of this package."""
    with pytest.raises(InvalidPlacement):
        ExpertPlacement.load(source)


@given(st.text() | st.recursive(st.integers() | st.text() | st.none(), st.lists).map(json.dumps))
def test_arbitrary_inline_documents_never_crash(document: str) -> None:
    """Any text is a placement or a clear error."""
    with suppress(InvalidPlacement):
        ExpertPlacement.load('{"physical_to_logical_map": ' + document + "}")


def test_an_expert_beyond_the_model_is_located() -> None:
    """The error names layer, physical and logical expert."""
    with pytest.raises(InvalidPlacement, match="layer 1: physical expert 1 holds logical expert 7"):
        ExpertPlacement.from_mapping([[0, 1], [0, 7]], 2)


def test_placements_cannot_be_changed() -> None:
    """The map is read-only and no view of the caller's array."""
    array = np.array([[0, 1]])
    placement = ExpertPlacement.from_mapping(array)
    array[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical_map[0, 0] = 1
    assert placement.physical_to_logical_map[0, 0] == 0


def test_unplaced_experts_are_listed_by_layer() -> None:
    """Only layers that miss one are listed."""
    assert ExpertPlacement.from_mapping([[0, 1, 2], [0, 0, -1]], 3).unplaced() == {1: (1, 2)}
