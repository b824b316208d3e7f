"""Loads as values: what is accepted and refused."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_eplb.errors import InvalidLoad
from async_eplb.load.value import ExpertLoad


@pytest.mark.parametrize(
    "counts", [[[1, 2], [3, 0]], np.array([[1, 2], [3, 0]]), torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)]
)
def test_counts_of_any_kind(counts: object) -> None:
    """Nested sequences, arrays and tensors are alike; integers stay integers."""
    load = ExpertLoad.from_counts(counts)
    assert (load.tokens.tolist(), load.tokens.dtype.name, load.num_steps) == ([[1, 2], [3, 0]], "int64", 1)


def test_half_precision_counts() -> None:
    """Tensors of a type that numpy does not have become float64."""
    assert ExpertLoad.from_counts(torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)).tokens.tolist() == [[0.5, 2.0]]


def test_counts_of_several_steps_are_summed() -> None:
    """The first of three dimensions is the step."""
    load = ExpertLoad.from_counts([[[1, 2]], [[3, 4]], [[0, 1]]])
    assert (load.tokens.tolist(), load.num_steps) == ([[4, 7]], 3)
    assert load.tokens_per_step().tolist() == [[4 / 3, 7 / 3]]


def test_loads_cannot_be_changed() -> None:
    """The table is read-only and no view of the caller's array."""
    array = np.array([[1, 2]])
    load = ExpertLoad.from_counts(array)
    array[0, 0] = 5
    with pytest.raises(ValueError, match="read-only"):
        load.tokens[0, 0] = 5
    assert load == ExpertLoad.from_counts([[1, 2]])


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [[]],
        [1, 2],
        [[1], [2, 3]],
        [[[[1]]]],
        [["a"]],
        [[True]],
        [[None]],
        [[-1, 2]],
        [[0.5, float("nan")]],
        [[float("inf"), 1.0]],
        [[2**53 + 2, 1]],
        [[[1, -1]], [[1, 5]]],
        torch.tensor([[1 + 1j]]),
    ],
)
def test_impossible_loads_are_refused(counts: object) -> None:
    """Wrong shapes, NaN, infinite, negative and uncountably large numbers."""
    with pytest.raises(InvalidLoad):
        ExpertLoad.from_counts(counts)


def test_an_impossible_number_is_located() -> None:
    """The error names layer and expert."""
    with pytest.raises(InvalidLoad, match="layer 1: logical expert 0 has -3 tokens"):
        ExpertLoad.from_counts([[0, 1], [-3, 7]])


def test_a_load_covers_a_step() -> None:
    """Nothing is counted in no steps."""
    with pytest.raises(InvalidLoad, match="num_steps"):
        ExpertLoad.from_counts([[1]], num_steps=0)


@pytest.mark.parametrize("suffix", [".json", ".pt", "inline"])
def test_loads_are_read_as_engines_write_them(tmp_path: Path, suffix: str) -> None:
    """Files of both kinds and inline JSON, under the key ``logical_count``."""
    counts = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    source: str | Path = tmp_path / f"load{suffix}"
    if suffix == ".pt":
        torch.save({"logical_count": torch.tensor(counts)}, source)
    elif suffix == ".json":
        Path(source).write_text(json.dumps({"logical_count": counts}))
    else:
        source = json.dumps({"logical_count": counts})
    assert ExpertLoad.load(source).tokens.tolist() == [[6, 8], [10, 12]]


@pytest.mark.parametrize(
    "source", ["{", "[]", "{}", '{"physical_to_logical_map": [[0]]}', "missing.json", "missing.pt", "load.csv"]
)
def test_unreadable_loads_are_refused(source: str) -> None:
    """Whatever is wrong with a file, the error is one of ours."""
    with pytest.raises(InvalidLoad):
        ExpertLoad.load(source)


@given(st.recursive(st.integers() | st.floats() | st.text() | st.none() | st.booleans(), st.lists).map(json.dumps))
def test_arbitrary_inline_documents_never_crash(document: str) -> None:
    """Any text is a load or a clear error."""
    with suppress(InvalidLoad):
        ExpertLoad.load('{"logical_count": ' + document + "}")


@pytest.mark.parametrize("tokens", [None, 1, "[[1]]", [[1]], torch.tensor([[1]]), np.array([[1]], dtype=np.int32)])
def test_a_load_itself_is_an_array_of_numpy(tokens: object) -> None:
    """The constructor says what takes the others."""
    with pytest.raises(InvalidLoad):
        ExpertLoad(tokens)  # type: ignore[arg-type]
