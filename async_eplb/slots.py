"""One tensor of a row as blocks of memory, a block for each slot: checked, and viewed as bytes.

Here alone it is decided what can be moved (rules 8 and 24): all later code sees addresses, extents and byte views.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import EplbError, InvalidSlot
from async_eplb.modes import outside_modes


class SlotLayout(NamedTuple):
    """How an expert lies in its slot of one tensor; equal on ranks that can exchange slots.

    :param dtype: its name
    :param strides: in elements; 0 for dimensions of one element, whose stride means nothing
    """

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> "SlotLayout":
        """Return the layout of an expert of this shape and these strides."""
        told = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
        return cls(str(dtype).removeprefix("torch."), dtype.itemsize, tuple(shape), told)

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last: the extent, with padding inside it."""
        return self.itemsize * _extent(self.shape, self.strides)

    @property
    def has_padding(self) -> bool:
        """Whether there are bytes in the extent that are of no element."""
        return self.nbytes > self.itemsize * prod(self.shape)


class _Place(NamedTuple):
    """Where a tensor is: what must stay while an updater moves it (rule 22)."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Place":
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True, slots=True, eq=False)
class SlotTensor:
    """One tensor of a row: a block of memory for each slot, all laid out alike.

    :param name: for errors
    :param addresses: of the blocks, int64 ``[slots]``
    :param views: of the blocks, uint8 ``[extent]`` each; they share the caller's memory
    :param sources: the caller's tensors: one of all slots, or one for each slot
    :param places: where these were when this was made
    """

    name: str
    device: torch.device
    layout: SlotLayout
    addresses: npt.NDArray[np.int64]
    views: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    places: tuple[_Place, ...]

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return len(self.views)

    def elements(self, slot: int) -> Tensor:
        """Return the elements of a slot, without padding, as uint8 ``[*shape, bytes of an element]`` in its memory."""
        size = self.layout.itemsize
        strides = (*(stride * size for stride in self.layout.strides), 1)
        return self.views[slot].as_strided((*self.layout.shape, size), strides)

    def content(self, slot: int) -> Tensor:
        """Return what is equal for replicas of an expert, as uint8 ``[bytes]``: a view, or a copy without padding."""
        return self.elements(slot).reshape(-1) if self.layout.has_padding else self.views[slot]


def slot_tensor(given: object, name: str, *, device: torch.device | None) -> SlotTensor:
    """Check one tensor of a row, and return its slots.

    :param given: ``[slots, ...]``, or a sequence of one tensor for each slot
    :param name: for errors
    :param device: that it must be on; any without it
    :raises InvalidSlot: if it is no tensor, is on another device, has no memory that its slots could be moved to and
        from, or elements of a slot share memory
    """
    with outside_modes(), _refusing(name):
        if isinstance(given, Tensor):
            return _of_one(given, name, device)
        if is_list(given):
            return _of_each(given, name, device)
    raise _refusal(name, f"is a {type(given).__name__}; give a tensor, or a list of one tensor for each slot")


def moved(tensors: Iterable[SlotTensor]) -> list[str]:
    """Return the names of tensors that are not where they were, or have not the memory that they had."""
    with outside_modes():
        return [tensor.name for tensor in tensors if not _is_in_place(tensor)]


def memory_fault(tensor: Tensor) -> str:
    """Return why a tensor's elements are not the bytes at its address; empty if they are."""
    try:
        return next((reason for reason, holds in _WITHOUT_MEMORY if holds(tensor)), "")
    except Exception as error:  # noqa: BLE001 - whatever a tensor without memory raises
        return _WRAPS.format(error)


def first_overlap(start: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """Return the places of two blocks of memory that share a byte, by ascending address; None if no two do.

    :param start: addresses of the blocks, ``[blocks]``
    :param nbytes: their sizes, ``[blocks]``
    """
    order = np.argsort(start, kind="stable")
    shared = np.flatnonzero((start + nbytes)[order][:-1] > start[order][1:])  # one begins before the last one ends
    return (int(order[shared[0]]), int(order[shared[0] + 1])) if len(shared) else None


def is_list(given: object) -> TypeGuard[Sequence[object]]:
    """Return whether something is a sequence of other things, and no text."""
    lists = Sequence, torch.nn.ParameterList
    return isinstance(given, lists) and not isinstance(given, str | bytes | bytearray | memoryview)


def _is_in_place(tensor: SlotTensor) -> bool:
    try:
        return tensor.places == tuple(_Place.of(_local(source)) for source in tensor.sources)
    except Exception:  # noqa: BLE001 - whatever a tensor without memory raises
        return False


def _of_one(given: Tensor, name: str, device: torch.device | None) -> SlotTensor:
    """Return the slots of a tensor ``[slots, ...]``."""
    tensor = _with_memory(given, name, device)
    if tensor.ndim == 0:
        raise _refusal(name, "has no dimensions; the first one is the slot")
    num_slots, step = tensor.shape[0], tensor.stride(0) * tensor.element_size()
    layout = _movable(tensor, name, slot_dimensions=1)
    addresses = tensor.data_ptr() + step * np.arange(num_slots, dtype=np.int64)
    views = _bytes(tensor, (num_slots, layout.nbytes), (step, 1)).unbind(0)
    return SlotTensor(name, tensor.device, layout, addresses, views, (given,), (_Place.of(tensor),))


def _of_each(given: Sequence[object], name: str, device: torch.device | None) -> SlotTensor:
    """Return the slots of a list of one tensor for each."""
    tensors: list[Tensor] = []
    layouts: set[SlotLayout] = set()
    for slot, part in enumerate(given):
        its_name = f"slot {slot} of {name}"
        if not isinstance(part, Tensor):
            raise _refusal(its_name, f"is a {type(part).__name__}, and no tensor")
        with _refusing(its_name):
            tensors.append(_with_memory(part, its_name, device))
            device = tensors[0].device
            layouts.add(_movable(tensors[-1], its_name, slot_dimensions=0))
        if len(layouts) > 1:
            raise _refusal(its_name, "has another dtype, shape or strides than the slots before; all must be alike")
    if not tensors:
        raise _refusal(name, "is an empty list: there is nothing to move")
    (layout,) = layouts
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    views = tuple(_bytes(tensor, (layout.nbytes,), (1,)) for tensor in tensors)
    places = tuple(_Place.of(tensor) for tensor in tensors)
    return SlotTensor(name, tensors[0].device, layout, addresses, views, tuple(given), places)  # type: ignore[arg-type]


_WRAPS = "has no memory of its own; if it wraps other tensors, give those ({!r})"
_WITHOUT_MEMORY: tuple[tuple[str, Callable[[Tensor], bool]], ...] = (
    ("is on the meta device, without memory", lambda tensor: tensor.is_meta),
    ("is nested; give the tensor of each slot in a list", lambda tensor: tensor.is_nested),
    ("is not dense; its slots cannot be moved as bytes", lambda tensor: tensor.layout is not torch.strided),
    ("is quantized, and its scale would stay behind; give its integers and its scale", lambda t: t.is_quantized),
    ("is a conjugated view; resolve it first", lambda tensor: tensor.is_conj()),
    ("is a negated view; resolve it first", lambda tensor: tensor.is_neg()),
    ("is empty: there is nothing to move", lambda tensor: tensor.numel() == 0),
    ("has no memory, or too little: its storage was freed", lambda tensor: not _is_in_storage(tensor)),
)
"""Why a tensor's elements cannot be moved as the bytes at its address, in the order in which it can be asked."""


def _with_memory(given: Tensor, name: str, device: torch.device | None) -> Tensor:
    """Return the part of a tensor that is in this rank's memory.

    :raises InvalidSlot: if there is none, as with wrappers, freed storage, and layouts that are not strided, or it is
        on another device
    """
    tensor = _local(given)
    if device is not None and tensor.device != device:
        raise _refusal(
            name, f"is on {tensor.device}, others are on {device}; all tensors of an updater must be on one device"
        )
    fault = memory_fault(tensor)
    if fault:
        raise _refusal(name, fault)
    return tensor


def _is_in_storage(tensor: Tensor) -> bool:
    """Return whether all elements are in the storage, and the first one where the tensor says."""
    storage, size, start = tensor.untyped_storage(), tensor.element_size(), tensor.storage_offset()
    end = size * (start + _extent(tensor.shape, tensor.stride()))
    return 0 != storage.data_ptr() == tensor.data_ptr() - size * start and end <= storage.nbytes()


def _movable(tensor: Tensor, name: str, *, slot_dimensions: int) -> SlotLayout:
    """Return the layout of a tensor's slots.

    :param slot_dimensions: 1 if the first dimension is the slot; 0 if the tensor is one slot
    :raises InvalidSlot: if elements of a slot share memory
    """
    layout = SlotLayout.of(tensor.dtype, tensor.shape[slot_dimensions:], tensor.stride()[slot_dimensions:])
    inside = 1
    for stride, size in sorted(zip(layout.strides, layout.shape, strict=True)):
        if size > 1 and stride < inside:
            raise _refusal(
                name,
                f"has strides {tensor.stride()}: elements of a slot share memory (an expanded or overlapping view); "
                "give every element memory of its own",
            )
        inside += (size - 1) * stride
    return layout


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor (a DTensor), and any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local


def _bytes(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    # Rule 8: bytes of the storage, whatever the dtype; torch cannot view every dtype as another.
    start = tensor.storage_offset() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start, tuple(shape), tuple(strides))


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements from the first to the last, inclusive, of a view that has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Refuse a tensor for whatever torch raises in the body."""
    try:
        yield
    except EplbError:
        raise
    except Exception as error:
        raise _refusal(name, _WRAPS.format(error)) from error


def _refusal(name: str, reason: str) -> InvalidSlot:
    return InvalidSlot(f"{name} {reason}", tensor=name)
