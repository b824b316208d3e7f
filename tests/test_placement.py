"""Topologies and placements: what is accepted, refused, saved and loaded."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.updates import examples

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


PLACEMENTS = st.builds(
    lambda seed, num_layers, num_experts, spare, num_empty: random_placement(
        np.random.default_rng(seed), num_layers, num_experts + spare, num_experts, num_empty=min(spare, num_empty)
    ),
    *(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)),
)


@examples
@given(PLACEMENTS, st.sampled_from(["json", "pt"]))
def test_every_saved_placement_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, placement: ExpertPlacement, ending: str
) -> None:
    """With the same digest, from any format."""
    path = tmp_path_factory.getbasetemp() / f"placement.{ending}"
    placement.save(path)
    assert ExpertPlacement.load(path) == placement
    assert ExpertPlacement.load(path).digest() == placement.digest()


@examples
@given(PLACEMENTS)
def test_equal_placements_have_equal_digests(placement: ExpertPlacement) -> None:
    """Whatever type, order of bytes and layout the map had, by either way to make one (rule 23)."""
    table, experts = placement.physical_to_logical_map, placement.num_logical_experts
    forms: list[Any] = [table.astype(dtype) for dtype in ("int8", "<i2", ">i4", "<i8", ">i8")]
    forms += [np.asfortranarray(table), np.repeat(table, 2, axis=1)[:, ::2], table.tolist()]
    forms += [torch.tensor(table, dtype=dtype) for dtype in (torch.int8, torch.int32, torch.int64)]
    if table.min() >= 0:
        forms += [table.astype("uint64"), torch.tensor(table, dtype=torch.uint8)]
    numbers: list[Any] = [experts, np.int16(experts), torch.tensor(experts)]
    for form in forms:
        for make in (ExpertPlacement, ExpertPlacement.from_mapping):
            for number in numbers:
                other = make(form, number)
                assert (other.digest(), other, hash(other)) == (placement.digest(), placement, hash(placement))
                assert other.physical_to_logical_map.dtype == np.int32
                assert type(other.num_logical_experts) is int


@examples
@given(PLACEMENTS, PLACEMENTS)
def test_different_placements_have_different_digests(one: ExpertPlacement, other: ExpertPlacement) -> None:
    """Maps, their shapes and the number of experts are all in it."""
    maps = [placement.physical_to_logical_map.tolist() for placement in (one, other)]
    alike = maps[0] == maps[1] and one.num_logical_experts == other.num_logical_experts
    assert (one.digest() == other.digest()) == alike
    assert ExpertPlacement.from_mapping(maps[0], one.num_logical_experts + 1) != one


def test_the_shape_of_a_map_is_in_its_digest() -> None:
    """Two layers of one slot are no layer of two."""
    assert ExpertPlacement.from_mapping([[0, 1]]) != ExpertPlacement.from_mapping([[0], [1]])


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
