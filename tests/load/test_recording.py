"""What may be recorded: types and shapes of tensors, whole counts, and the modes of torch around them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loads import OpNames, counted

from async_eplb.errors import InvalidLoad, InvalidOptions
from async_eplb.load.window import LoadWindow

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
NO_INTEGERS = [torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]


def in_type(numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of a type that torch may not fill by itself."""
    return torch.from_numpy(np.array(numbers, dtype=str(dtype).removeprefix("torch.")))


@st.composite
def ids(draw: st.DrawFn) -> tuple[torch.dtype, list[int]]:
    """Draw a type of ids, and ids that it can hold: small ones, any, and the outermost."""
    dtype = draw(st.sampled_from(SIGNED + UNSIGNED))
    limits = np.iinfo(str(dtype).removeprefix("torch."))
    smallest, largest = int(limits.min), int(limits.max)
    number = st.integers(max(-2, smallest), 6) | st.integers(smallest, largest) | st.sampled_from([smallest, largest])
    return dtype, draw(st.lists(number, max_size=8))


@settings(deadline=None)
@given(ids(), st.booleans(), st.sampled_from([torch.bool, *SIGNED, *UNSIGNED]), st.data())
def test_ids_and_masks_of_every_type_are_counted(
    drawn: tuple[torch.dtype, list[int]],
    physical: bool,  # noqa: FBT001
    mask_dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """Ids within the model are counted, negative and masked ones ignored, all others found beyond the model."""
    dtype, numbers = drawn
    kept = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    table = [2, 0, 1, -1]
    expert_map = SimpleNamespace(physical_to_logical_map=torch.tensor([table], dtype=torch.int32))
    window = LoadWindow(1, 3, 1, expert_map=expert_map)
    window.record(0, in_type(numbers, dtype), physical=physical, valid=torch.tensor(kept).to(mask_dtype))
    window.advance()
    logical = [table[n] if physical and 0 <= n < 4 else n for n, keep in zip(numbers, kept, strict=True) if keep]
    beyond = sum(n >= 3 for n in logical)
    if beyond:
        with pytest.raises(InvalidLoad, match=f"{beyond} recorded experts are beyond"):
            counted(window)
    else:
        assert counted(window) == [[logical.count(expert) for expert in range(3)]]


@pytest.mark.parametrize("dtype", NO_INTEGERS, ids=str)
def test_what_is_no_integer_is_refused(dtype: torch.dtype) -> None:
    """Ids, masks (but for bool) and counts; nothing is counted."""
    window = LoadWindow(1, 2, 1)
    wrong, ids = torch.zeros(2).to(dtype), torch.tensor([0, 1])
    with pytest.raises(InvalidLoad, match=f"experts holds {dtype}"):
        window.record(0, wrong)
    with pytest.raises(InvalidLoad, match=f"counts holds {dtype}"):
        window.record_counts(wrong.view(1, 2), physical=False)
    if dtype is not torch.bool:
        with pytest.raises(InvalidLoad, match=f"valid holds {dtype}"):
            window.record(0, ids, valid=wrong)
    window.advance()
    assert counted(window) == [[0, 0]]


WRONG: dict[str, Callable[[LoadWindow], None]] = {
    "a list": lambda window: window.record(0, [0, 1]),  # type: ignore[arg-type]
    "an array": lambda window: window.record_counts(np.zeros((2, 3))),  # type: ignore[arg-type]
    "another device": lambda window: window.record(0, torch.zeros(2, dtype=torch.int32, device="meta")),
    "counts of another device": lambda window: window.record_counts(
        torch.zeros(2, 3, dtype=torch.int64, device="meta")
    ),
    "a layer too many": lambda window: window.record(2, torch.tensor([0])),
    "a layer from the end": lambda window: window.record(-1, torch.tensor([0])),
    "a mask of other tokens": lambda window: window.record(0, torch.zeros(3, 2).int(), valid=torch.ones(2).bool()),
    "a mask of more dimensions": lambda window: window.record(0, torch.zeros(2).int(), valid=torch.ones(2, 1).bool()),
    "logical counts as physical": lambda window: window.record_counts(torch.zeros(2, 2).int()),
    "physical counts as logical": lambda window: window.record_counts(torch.zeros(2, 3).int(), physical=False),
    "counts of one layer": lambda window: window.record_counts(torch.zeros(3).int()),
    "counts of too many layers": lambda window: window.record_counts(torch.zeros(3, 3).int()),
}


@pytest.mark.parametrize("record", WRONG.values(), ids=WRONG)
def test_a_tensor_that_does_not_fit_is_refused(record: Callable[[LoadWindow], None]) -> None:
    """By name, before anything is counted."""
    expert_map = SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 1, 0], [1, 1, 0]]))
    window = LoadWindow(2, 2, 1, expert_map=expert_map)
    with pytest.raises(InvalidLoad, match=r"experts|counts|valid|layer"):
        record(window)
    window.advance()
    assert counted(window) == [[0, 0], [0, 0]]


def test_a_map_of_other_layers_is_refused() -> None:
    """When the window is made."""
    with pytest.raises(InvalidOptions, match="expert_map has 1 layers"):
        LoadWindow(2, 2, 1, expert_map=SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 1]])))


@settings(deadline=None)
@given(
    st.sampled_from(SIGNED + UNSIGNED),
    st.lists(st.lists(st.integers(0, 9), min_size=8, max_size=8), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(-1, 2), min_size=8, max_size=8), min_size=4, max_size=4),
)
def test_whole_counts_fold_by_the_map_of_their_step(
    dtype: torch.dtype, passes: list[list[int]], maps: list[list[int]]
) -> None:
    """Counts of all layers, of any type; a later map does not change them, and empty slots are not counted."""
    expert_map = SimpleNamespace(physical_to_logical_map=torch.zeros(2, 4, dtype=torch.int64))
    window = LoadWindow(2, 3, 8, expert_map=expert_map)
    expected = np.zeros((2, 3), dtype=int)
    for numbers, table in zip(passes, maps, strict=False):
        expert_map.physical_to_logical_map.copy_(torch.tensor(table).view(2, 4))
        window.record_counts(in_type(numbers, dtype).view(2, 4), phase="prefill")
        window.advance()
        for place, (tokens, expert) in enumerate(zip(numbers, table, strict=True)):
            if expert >= 0:
                expected[place // 4, expert] += tokens
    assert counted(window, "prefill") == expected.tolist()


def test_whole_logical_counts_need_no_map() -> None:
    """They are added as they are, to what was recorded by ids."""
    window = LoadWindow(2, 2, 2)
    window.record(1, torch.tensor([1]))
    window.record_counts(torch.tensor([[1, 2], [3, 4]]), physical=False)
    window.advance()
    assert counted(window) == [[1, 2], [3, 5]]
    with pytest.raises(InvalidOptions, match="expert_map"):
        window.record_counts(torch.tensor([[1, 2], [3, 4]]))


def test_a_map_with_experts_beyond_the_model_is_found() -> None:
    """When the load is taken, as such ids are; not as an index that no column has."""
    window = LoadWindow(1, 2, 2, expert_map=SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 5]])))
    window.record_counts(torch.tensor([[4, 3]]))
    window.advance()
    with pytest.raises(InvalidLoad, match="3 recorded experts are beyond"):
        counted(window)


def test_whole_counts_are_one_operation_and_no_wait() -> None:
    """As many launches for many layers as for one, and no value is read on the host."""

    def ops_of(num_layers: int) -> OpNames:
        expert_map = SimpleNamespace(physical_to_logical_map=torch.zeros(num_layers, 4, dtype=torch.int64))
        window = LoadWindow(num_layers, 3, 2, expert_map=expert_map)
        ops = OpNames()
        with ops:
            window.record_counts(torch.ones(num_layers, 4, dtype=torch.int32))
        return ops

    one, many = ops_of(1), ops_of(50)
    assert one.number == many.number <= 8
    assert "aten::scatter_add_" in many.names
    assert not many.waiting


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": nullcontext,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("taken_in", MODES)
@pytest.mark.parametrize("recorded_in", MODES)
@pytest.mark.parametrize("made_in", MODES)
def test_modes_of_torch_do_not_matter(made_in: str, recorded_in: str, taken_in: str) -> None:
    """A window counts whatever mode it was made in, records in, or is read in."""
    ids, counts = torch.tensor([0, 1, 1]), torch.tensor([[1, 2]])
    with MODES[made_in]():
        window = LoadWindow(1, 2, 2)
    with MODES[recorded_in]():
        window.record(0, ids, valid=ids < 5)
        window.record_counts(counts, physical=False)
        window.advance()
    with MODES[taken_in]():
        assert counted(window) == [[2, 4]]


def test_a_default_dtype_does_not_matter() -> None:
    """Counts are integers."""
    torch.set_default_dtype(torch.float64)
    try:
        window = LoadWindow(1, 2, 2)
        window.record(0, torch.tensor([0, 1, 1]))
        window.advance()
        assert counted(window) == [[1, 2]]
    finally:
        torch.set_default_dtype(torch.float32)
