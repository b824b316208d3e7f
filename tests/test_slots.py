"""Slots as blocks of memory: what can be moved, in any layout, and what is refused by name."""

import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.odd_layouts import apart, transposed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from async_eplb.errors import InvalidSlot
from async_eplb.slots import slot_tensor
from async_eplb.testing import WorldRank, run_world

TENSOR = torch.arange(24.0).view(2, 3, 4)
DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float32, torch.bool, torch.complex64, torch.int64]


class Plain(Tensor):
    """A subclass with memory of its own, as engines' parameters are."""


class Hostile(Tensor):
    """A subclass with memory of its own whose every method raises."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise RuntimeError("it does nothing")


class Wrapper(Tensor):
    """A subclass whose elements are in another tensor."""

    def __new__(cls, inner: Tensor, **policy: Any) -> Self:
        make: Any = Tensor._make_wrapper_subclass  # noqa: SLF001 - torch has no other
        return make(cls, inner.shape, dtype=inner.dtype, device=inner.device, **policy)  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError("it does nothing")


class Local(Wrapper):
    """A wrapper that says which part is on this rank, as DTensor does."""

    def to_local(self) -> Tensor:
        return TENSOR


def freed(nbytes: int = 0) -> Tensor:
    tensor = TENSOR.clone()
    tensor.untyped_storage().resize_(nbytes)
    return tensor


WITHOUT_MEMORY: dict[str, Callable[[], object]] = {
    "wrapper": lambda: Wrapper(TENSOR),
    "wrapper with sizes of its own": lambda: Wrapper(
        TENSOR, dispatch_sizes_strides_policy="sizes", dispatch_device=True, dispatch_layout=True
    ),
    "freed": freed,
    "freed in part": lambda: freed(40),
    "meta": lambda: TENSOR.to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(TENSOR),
    "functional": lambda: torch._to_functional_tensor(TENSOR),  # noqa: SLF001
    "sparse": TENSOR.to_sparse,
    "sparse rows": lambda: torch.zeros(2, 4).to_sparse_csr(),
    "mkldnn": TENSOR.to_mkldnn,
    "nested": lambda: torch.nested.nested_tensor([TENSOR[0]] * 2),
    "jagged": lambda: torch.nested.nested_tensor([TENSOR[0]] * 2, layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(TENSOR, 1.0, 0, torch.qint8),
    "conjugated": lambda: TENSOR.to(torch.complex64).conj(),
    "negated": lambda: TENSOR.to(torch.complex64).conj().imag,
    "zeros without memory": lambda: torch._efficientzerotensor(2, 4),  # noqa: SLF001
    "not initialised": nn.UninitializedParameter,
    "empty": lambda: torch.zeros(2, 0),
    "no slots": lambda: torch.zeros(0, 2),
    "None": lambda: None,
    "numpy": lambda: np.zeros((2, 4)),
    "number": lambda: 3.0,
    "text": lambda: "w13",
    "generator": lambda: iter([TENSOR]),
}


REASONS = {
    "wrapper": "wraps other tensors",
    "freed": "freed",
    "freed in part": "freed",
    "meta": "on the meta device",
    "sparse": "not dense",
    "mkldnn": "not dense",
    "nested": "is nested",
    "jagged": "is nested",
    "empty": "nothing to move",
    "numpy": "is a ndarray",
}


@pytest.mark.parametrize("what", WITHOUT_MEMORY)
def test_what_has_no_memory_is_refused_by_name(what: str) -> None:
    """Whatever it is, alone or as one slot of a list; torch raises nothing of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are prototypes of torch, others are going
        tensor = WITHOUT_MEMORY[what]()
    for each, name in ((tensor, "w2"), ([TENSOR[0], tensor], "slot 1 of w2")):
        with pytest.raises(InvalidSlot, match=f"^{name} ") as caught:
            slot_tensor(each, "w2", device=None)
        assert caught.value.tensor == name
        assert REASONS.get(what, "") in str(caught.value) or "others are on" in str(caught.value)


def test_tensors_inside_transforms_are_refused() -> None:
    """Inside them, vmap and grad hand out tensors whose memory cannot be seen."""

    def refuse(tensor: Tensor) -> Tensor:
        with pytest.raises(InvalidSlot, match=r"^w2 "):
            slot_tensor(tensor, "w2", device=None)
        return tensor.sum()

    torch.vmap(refuse)(TENSOR)
    torch.func.grad(refuse)(TENSOR)


SHARING: dict[str, Callable[[], Tensor]] = {
    "columns of one": lambda: torch.zeros(2, 3, 1).expand(2, 3, 4),
    "overlapping": lambda: torch.zeros(40).as_strided((2, 3, 4), (20, 2, 1)),
}


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_elements_that_share_memory_are_refused_by_name(make: Callable[[], Tensor]) -> None:
    """Inside of a slot, also of one in a list."""
    with pytest.raises(InvalidSlot, match=r"^w2 .*share memory"):
        slot_tensor(make(), "w2", device=None)
    with pytest.raises(InvalidSlot, match=r"^slot 0 of w2 .*share memory"):
        slot_tensor([*make()], "w2", device=None)


def test_scalars_are_slots_but_have_none() -> None:
    """In a list they are one expert's each; alone, there is no dimension of slots."""
    assert slot_tensor([torch.tensor(1.0)], "w2", device=None).layout.nbytes == 4
    with pytest.raises(InvalidSlot, match=r"^w2 has no dimensions"):
        slot_tensor(torch.tensor(1.0), "w2", device=None)


def test_slots_in_a_list_are_alike() -> None:
    """Their dtype, shape and order of dimensions."""
    for other in (torch.zeros(3, 4).double(), torch.zeros(4, 3), torch.zeros(4, 3).T):
        with pytest.raises(InvalidSlot, match=r"^slot 1 of w2 has another dtype, shape or strides"):
            slot_tensor([torch.zeros(3, 4), other], "w2", device=None)
    with pytest.raises(InvalidSlot, match="empty list"):
        slot_tensor([], "w2", device=None)


@pytest.mark.parametrize(
    "make",
    [nn.Parameter, lambda t: t.as_subclass(Plain), lambda t: t.as_subclass(Hostile), lambda t: nn.Parameter(Plain(t))],
    ids=["parameter", "subclass", "subclass that raises", "parameter of a subclass"],
)
def test_subclasses_with_memory_are_taken(make: Callable[[Tensor], Tensor]) -> None:
    """Their bytes are written in place, and no autograd hinders that."""
    plain = TENSOR.clone()
    slot_tensor(make(plain), "w2", device=None).views[1].zero_()
    assert plain[0].equal(TENSOR[0])
    assert not plain[1].any()


def test_the_local_part_of_a_distributed_tensor_is_taken() -> None:
    """Also where only this rank has one."""
    assert slot_tensor(Local(TENSOR), "w2", device=None).addresses[0] == TENSOR.data_ptr()
    assert slot_tensor([Local(TENSOR)], "w2", device=None).addresses[0] == TENSOR.data_ptr()


def take_dtensors(_: WorldRank) -> list[float]:
    """Be the only rank of a mesh; write to what a DTensor's slots are."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - takes seconds
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    given = DTensor.from_local(TENSOR.clone(), init_device_mesh("cpu", (1,)), [Shard(0)])
    parameter = nn.Parameter(given)
    with torch.inference_mode():
        slots = slot_tensor(parameter, "w2", device=None)
    slots.views[1].zero_()
    sums: list[float] = given.to_local().sum(dim=(1, 2)).tolist()
    return sums


@pytest.mark.exhaustive
def test_dtensors_are_taken() -> None:
    """Their local parts, in any mode of torch."""
    assert run_world(take_dtensors, 1) == [[66.0, 0.0]]


@st.composite
def any_layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw a storage of bytes and a tensor in it: dimensions in any order, with padding, gaps, and an offset."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    strides, step = [0] * len(shape), draw(st.integers(1, 2)) if shape else 1
    for dimension in draw(st.permutations(range(len(shape)))):
        strides[dimension] = step
        step = step * shape[dimension] + draw(st.integers(0, 2))
    num_slots, start, gap = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    storage = torch.randint(0, 2, ((start + num_slots * (step + gap)) * dtype.itemsize,), dtype=torch.uint8)
    return storage, storage.view(dtype).as_strided((num_slots, *shape), (step + gap, *strides), start)


@settings(max_examples=100, deadline=None)
@given(any_layouts(), st.booleans())
def test_blocks_of_any_layout(drawn: tuple[Tensor, Tensor], is_list: bool) -> None:  # noqa: FBT001 - drawn
    """A slot's view begins at its address and ends with its last element; writing it changes that slot only."""
    storage, tensor = drawn
    slots = slot_tensor([*tensor] if is_list else tensor, "w2", device=None)
    assert slots.addresses.tolist() == [view.data_ptr() for view in slots.views] == [part.data_ptr() for part in tensor]
    before, raw = storage.clone(), storage.numpy()
    wanted = torch.where(tensor[-1].ne(0), 0, 1).to(tensor.dtype)
    as_slot = torch.empty_strided(tensor.shape[1:], tensor.stride()[1:], dtype=tensor.dtype).copy_(wanted)
    slots.views[-1].copy_(slot_tensor([as_slot], "w2", device=None).views[0])
    assert tensor[-1].equal(wanted)
    first = slots.addresses[-1] - storage.data_ptr()
    outside = np.ones(len(raw), dtype=bool)
    outside[first : first + slots.layout.nbytes] = False
    assert (raw[outside] == before.numpy()[outside]).all()


@settings(max_examples=100, deadline=None)
@given(any_layouts())
def test_elements_are_those_of_the_tensor(drawn: tuple[Tensor, Tensor]) -> None:
    """In the order of its dimensions, whatever their order in memory; padding is not among them."""
    tensor = drawn[1]
    slots = slot_tensor(tensor, "w2", device=None)
    for slot, part in enumerate(tensor):
        expected = torch.empty(part.shape, dtype=part.dtype).copy_(part).reshape(-1).view(torch.uint8)
        assert slots.elements(slot).reshape(-1).equal(expected)
        if slots.layout.has_padding:
            assert slots.content(slot).equal(expected)
        else:
            assert slots.content(slot).data_ptr() == part.data_ptr()


def test_the_layout_of_a_list_is_that_of_a_tensor() -> None:
    """Ranks may give one expert's tensors either way; dimensions of one element have no stride."""
    (one, two) = (slot_tensor(each, "w2", device=None) for each in (transposed(TENSOR), apart(TENSOR)))
    assert one.layout == two.layout
    narrow = torch.zeros(2, 1, 4)
    strange = torch.zeros(8).as_strided((2, 1, 4), (4, 77, 1))
    assert len({slot_tensor(each, "w2", device=None).layout for each in (narrow, strange)}) == 1
