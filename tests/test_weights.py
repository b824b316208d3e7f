"""Live weights of a rank: which rows are taken, and what is refused by name."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.odd_layouts import apart, oddly_laid_out, padded, transposed
from torch import Tensor, nn

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport
from async_eplb.errors import InvalidSlot, InvalidWeights, MovedWeights, SlotCountMismatch
from async_eplb.weights import Slots

TENSOR = torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4).to(torch.float8_e4m3fn),
        torch.zeros(3, 2, 2, dtype=torch.bfloat16),
        torch.zeros(3),
        torch.zeros(3, 8)[:, :4],
        torch.zeros(6, 4)[::2],
        torch.zeros(9)[3:6],
        torch.zeros(3, 4, 2).transpose(1, 2),
    ],
    ids=["fp8", "3d", "one number each", "gap between slots", "every other", "offset", "transposed"],
)
def test_views_share_memory(tensor: Tensor) -> None:
    """Writing a slot's byte view changes that slot and no other."""
    before = tensor.clone()
    (view,) = ExpertWeights({0: [tensor]}).slot_views(0, 1)
    assert view.dtype == torch.uint8
    assert view.shape == (tensor[0].numel() * tensor.element_size(),)
    view.fill_(0x11)
    assert tensor[0].tolist() == before[0].tolist()
    assert tensor[2].tolist() == before[2].tolist()
    assert bytes(tensor[1].contiguous().view(-1).view(torch.uint8).tolist()) == b"\x11" * view.shape[0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 4).expand(2, 4),
        torch.zeros(16).as_strided((2, 4), (2, 1)),
        torch.zeros(4, 2).T,
        torch.zeros(2, 0),
        torch.zeros(2, 4).to_sparse(),
        torch.zeros(2, 4, 1).expand(2, 4, 3),
        [torch.zeros(4)] * 2,
    ],
    ids=["expanded", "overlapping", "interleaved", "empty", "sparse", "expanded inside", "the same twice"],
)
def test_unmovable_slots_are_refused_by_name(tensor: Slots) -> None:
    """The error names the tensor."""
    with pytest.raises(InvalidSlot, match="w2 of row 7") as caught:
        ExpertWeights({7: [torch.zeros(2, 4), tensor]}, names=["w13", "w2"])
    assert caught.value.tensor == "w2 of row 7"


def test_two_tensors_in_the_same_memory_are_refused() -> None:
    """Rows or tensors that alias each other would be written twice."""
    tensor = torch.zeros(2, 4)
    with pytest.raises(InvalidSlot, match="shares memory"):
        ExpertWeights({0: [tensor], 1: [tensor]})


def test_interleaved_tensors_are_fine() -> None:
    """Tensors may share a storage as long as no slots share a byte."""
    block = torch.zeros(2, 8)
    ExpertWeights({0: [block[:, :4], block[:, 4:]]})


def test_slots_inside_each_other_are_refused() -> None:
    """What is moved is the extent of a slot, so nothing else may lie between its rows."""
    block = torch.zeros(2, 3, 8)
    with pytest.raises(InvalidSlot, match="lies inside it"):
        ExpertWeights({0: [block[..., :4], block[..., 4:]]})


def test_different_slot_counts_are_refused() -> None:
    """Whether slots are the first dimension or a list."""
    for tensor in (torch.zeros(3, 4), [torch.zeros(4)] * 3):
        with pytest.raises(SlotCountMismatch, match="a list inside the row's list"):
            ExpertWeights({0: [torch.zeros(2, 4)], 1: [tensor]})


def test_mixed_devices_are_refused() -> None:
    """All tensors are on one device."""
    with pytest.raises(InvalidWeights, match="tensor 1 of row 0 is on meta, others are on cpu"):
        ExpertWeights({0: [torch.zeros(2, 4), torch.zeros(2, 4, device="meta")]})


NOT_ROWS: dict[str, Any] = {
    "nothing": {},
    "None": None,
    "list of rows": [[TENSOR]],
    "tensor": TENSOR,
    "text": "weights",
    "generator": ((row, [TENSOR]) for row in range(1)),
    "empty row": {0: []},
    "None for a row": {0: None},
    "tensor for a row": {0: TENSOR},
    "array for a row": {0: np.zeros((2, 3, 4))},
    "text for a row": {0: "ab"},
    "generator for a row": {0: iter([TENSOR])},
    "mapping for a row": {0: {"w13": TENSOR}},
    "set for a row": {0: {TENSOR}},
    "no dimensions": {0: [torch.tensor(1.0)]},
    "None in a row": {0: [TENSOR, None]},
    "list of lists of lists": {0: [[[TENSOR]]]},
    "row by name": {"0": [TENSOR]},
    "row by position": {(0,): [TENSOR]},
    "negative row": {-1: [TENSOR]},
    "row that is true": {True: [TENSOR]},
    "row between rows": {0.5: [TENSOR]},
    "row that is a tensor": {torch.tensor(0): [TENSOR]},
}


@pytest.mark.parametrize("tensors", NOT_ROWS.values(), ids=NOT_ROWS)
def test_what_is_not_rows_of_tensors_is_refused(tensors: Any) -> None:
    """By a typed error, whatever it is."""
    with pytest.raises(InvalidWeights):
        ExpertWeights(tensors)


@pytest.mark.parametrize("names", ["w13", None, [1], 3])
def test_names_are_texts(names: Any) -> None:
    """A single one is a mistake."""
    with pytest.raises(InvalidWeights, match="names"):
        ExpertWeights({0: [TENSOR]}, names=names)


def test_rows_of_many_kinds_are_taken() -> None:
    """Any mapping, numpy's integers, tuples and parameter lists; a list inside a row has a tensor for each expert."""
    for tensors in (
        UserDict({3: (TENSOR,)}),
        {np.int64(3): nn.ParameterList([TENSOR])},
        {3: [nn.ParameterList([*TENSOR])]},
        {3: [tuple(TENSOR)]},
    ):
        weights = ExpertWeights(tensors)  # type: ignore[arg-type]
        assert weights.rows == (3,)
        assert weights.num_local_physical_experts == 2
        assert weights.slot_views(3, 1)[0].data_ptr() == TENSOR[1].data_ptr()


def test_one_tensor_for_each_expert() -> None:
    """They lie anywhere; addresses, sizes and shapes are as if they were in one."""
    weights = ExpertWeights({0: [torch.zeros(2, 5), apart(TENSOR)]})
    assert weights.slot_nbytes(0) == (20, 48)
    assert weights.shapes(0) == [[2, 5], [2, 3, 4]]
    assert weights.addresses(0, [1, 0]).tolist() == [
        [view.data_ptr() for view in weights.slot_views(0, slot)] for slot in (1, 0)
    ]


def test_an_extent_has_its_padding() -> None:
    """From the first element to the last: of scales padded for TMA, 7 columns of 512 elements with 509 in use."""
    scales = torch.zeros(3 * 2048 * 2).as_strided((3, 509, 7), (4096, 1, 512))
    assert ExpertWeights({0: [scales]}).slot_nbytes(0) == ((6 * 512 + 509) * 4,)


DIGEST = ExpertWeights({0: [TENSOR], 2: [torch.zeros(2, dtype=torch.int8)]}).digest()


def test_equal_layouts_have_equal_digests() -> None:
    """Whatever numbers, containers and gaps they were given with: in this version, always this one."""
    number, numbers = torch.zeros(2, dtype=torch.int8), torch.zeros(5, dtype=torch.int8)
    alike: list[dict[Any, Any]] = [
        {2: [number], 0: [torch.zeros(4, 3, 4)[::2]]},
        {np.int64(0): (TENSOR,), np.uint8(2): (number,)},
        {0: [[*TENSOR]], 2: [numbers[1::2]]},
        {0: [nn.Parameter(torch.zeros(5, 3, 4))], 2: [numbers]},  # the number of slots is no part of it
    ]
    assert {ExpertWeights(tensors).digest() for tensors in alike} == {DIGEST}
    assert DIGEST.hex() == "0f2a22561510da9a5992a74efbf42aff"


@pytest.mark.parametrize(
    "tensors",
    [
        {0: [TENSOR], 3: [torch.zeros(2, dtype=torch.int8)]},
        {0: [TENSOR, torch.zeros(2, dtype=torch.int8)]},
        {0: [TENSOR], 2: [torch.zeros(2, dtype=torch.uint8)]},
        {0: [TENSOR], 2: [torch.zeros(2, 1, dtype=torch.int8)]},
        {0: [transposed(TENSOR)], 2: [torch.zeros(2, dtype=torch.int8)]},
        {0: [padded(TENSOR)], 2: [torch.zeros(2, dtype=torch.int8)]},
    ],
    ids=["row", "rows", "dtype", "shape", "order of dimensions", "padding"],
)
def test_other_layouts_have_other_digests(tensors: dict[int, list[Slots]]) -> None:
    """Bytes of ranks with different ones mean something else."""
    assert ExpertWeights(tensors).digest() != DIGEST


def resize(parameter: nn.Parameter) -> None:
    parameter.untyped_storage().resize_(0)


def swap(parameter: nn.Parameter) -> None:
    torch.utils.swap_tensors(parameter, nn.Parameter(torch.zeros(2, 3, 4)))  # type: ignore[no-untyped-call]


def narrow(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data[:, :2]


def replace_by(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    def replace(parameter: nn.Parameter) -> None:
        parameter.data = make(parameter.data)

    return replace


@pytest.mark.parametrize("move", [replace_by(torch.clone), replace_by(torch.empty_like), resize, swap, narrow])
@pytest.mark.parametrize("is_list", [False, True])
def test_weights_that_moved_are_named(move: Callable[[nn.Parameter], None], is_list: bool) -> None:  # noqa: FBT001
    """Those that have other memory than they had, or none; all others are where they were."""
    moving = nn.Parameter(TENSOR.clone())
    given: Slots = [torch.zeros(2, 3, 4), moving] if is_list else moving
    weights = ExpertWeights({0: [torch.zeros(2, 4), torch.zeros(2, 1)], 5: [given]}, names=["w13"])
    weights.require_in_place()
    move(moving)
    with pytest.raises(MovedWeights, match=r"not where they were: w13 of row 5 \(1 tensors\)") as caught:
        weights.require_in_place()
    assert (caught.value.tensors, caught.value.layers) == (("w13 of row 5",), (5,))


def test_weights_that_are_written_have_not_moved() -> None:
    """In place, or by a new view of the same memory."""
    parameter = nn.Parameter(TENSOR.clone())
    weights = ExpertWeights({0: [parameter]})
    parameter.data.zero_()
    parameter.data = parameter.data.view(2, 3, 4)
    parameter.requires_grad = False
    weights.require_in_place()


def test_only_weights_of_the_same_layout_take_their_place() -> None:
    """Rows, layouts and the number of slots are compared; whether experts are apart is not."""
    before = ExpertWeights({0: [TENSOR]})
    before.require_alike(ExpertWeights({0: [[*TENSOR]]}))
    for other in ({1: [TENSOR]}, {0: [TENSOR.double()]}, {0: [transposed(TENSOR)]}, {0: [torch.zeros(3, 3, 4)]}):
        with pytest.raises(InvalidWeights, match="the new weights"):
            before.require_alike(ExpertWeights(other))


def test_a_column_leaves_names_as_they_were() -> None:
    """The column is one more tensor, and errors go on naming the others as the caller does."""
    parameter = nn.Parameter(TENSOR.clone())
    weights = ExpertWeights({0: [parameter]}, names=["w13"]).with_column({0: torch.zeros(2, 2)}, "the column")
    assert weights.slot_nbytes(0) == (48, 8)
    parameter.data = parameter.data.clone()
    with pytest.raises(MovedWeights, match="w13 of row 0"):
        weights.require_in_place()


def test_all_odd_layouts_together() -> None:
    """As the other tests use them."""
    weights = ExpertWeights(oddly_laid_out({0: [TENSOR] * 3}))
    assert [elements.reshape(-1).view(torch.float32).tolist() for elements in weights.slot_elements(0, 1)] == [
        TENSOR[1].reshape(-1).tolist()
    ] * 3


@pytest.mark.parametrize("given", [None, {0: [TENSOR]}, [TENSOR], TENSOR], ids=["None", "rows", "list", "tensor"])
def test_an_updater_takes_weights_and_no_tensors(given: Any) -> None:
    """The tensors go into ExpertWeights, which checks them."""
    (transport,) = MemoryTransport.world(1)
    with pytest.raises(InvalidWeights, match="give ExpertWeights"):
        ExpertUpdater(given, ExpertPlacement.from_mapping([[0, 1]]), EPTopology(1, 1, 2), rank=0, transport=transport)
