"""Live weights: what can be moved as bytes, and what is refused by name."""

import pytest
import torch
from torch import Tensor

from async_eplb import ExpertWeights
from async_eplb.errors import InvalidSlot, InvalidWeights, SlotCountMismatch


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4).to(torch.float8_e4m3fn),
        torch.zeros(3, 2, 2, dtype=torch.bfloat16),
        torch.zeros(3),
        torch.zeros(3, 8)[:, :4],
        torch.zeros(6, 4)[::2],
        torch.zeros(9)[3:6],
    ],
    ids=["fp8", "3d", "one number each", "gap between slots", "every other", "offset"],
)
def test_views_share_memory(tensor: Tensor) -> None:
    """Writing a slot's byte view changes that slot and no other."""
    before = tensor.clone()
    (view,) = ExpertWeights({0: [tensor]}).slot_views(0, 1)
    assert view.dtype == torch.uint8
    assert view.shape == (tensor[0].numel() * tensor.element_size(),)
    view.fill_(0x11)
    assert tensor[0].view(-1).tolist() == before[0].view(-1).tolist()
    assert tensor[2].view(-1).tolist() == before[2].view(-1).tolist()
    assert bytes(tensor[1].contiguous().view(-1).view(torch.uint8).tolist()) == b"\x11" * view.shape[0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 4, 4).transpose(1, 2),
        torch.zeros(1, 4).expand(2, 4),
        torch.zeros(16).as_strided((2, 4), (2, 1)),
        torch.zeros(2, 0),
        torch.zeros(2, 4).to_sparse(),
    ],
    ids=["not contiguous", "expanded", "overlapping", "empty", "sparse"],
)
def test_unmovable_slots_are_refused_by_name(tensor: Tensor) -> None:
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


def test_different_slot_counts_are_refused() -> None:
    """The first dimension is the number of slots."""
    with pytest.raises(SlotCountMismatch):
        ExpertWeights({0: [torch.zeros(2, 4)], 1: [torch.zeros(3, 4)]})


def test_mixed_devices_are_refused() -> None:
    """All tensors are on one device."""
    with pytest.raises(InvalidWeights, match="weights are on cpu, meta"):
        ExpertWeights({0: [torch.zeros(2, 4), torch.zeros(2, 4, device="meta")]})


@pytest.mark.parametrize("tensors", [{}, {0: []}, {0: [torch.tensor(1.0)]}])
def test_nothing_to_move_is_refused(tensors: dict[int, list[Tensor]]) -> None:
    """There must be rows, tensors and a slot dimension."""
    with pytest.raises(InvalidWeights):
        ExpertWeights(tensors)
