"""Byte views of live expert weights: slots of any dtype as uint8."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import InvalidSlot, InvalidWeights, SlotCountMismatch


class ExpertWeights:
    """Byte views of the routed expert weights of a rank. They share the memory of the caller's tensors.

    :param tensors: row of the placement → its tensors, each ``[local physical experts, ...]`` of any dtype. Slots
        must be contiguous and share no memory; gaps between slots are fine.
    :param names: of the tensors of a row, in order, for errors
    :raises InvalidSlot: if a slot is not contiguous, is expanded, or overlaps another
    :raises SlotCountMismatch: if the first dimensions of tensors differ
    :raises InvalidWeights: if tensors are on several devices, or there is nothing to move
    """

    def __init__(self, tensors: Mapping[int, Sequence[Tensor]], *, names: Sequence[str] = ()) -> None:
        if not tensors or not all(tensors.values()):
            raise InvalidWeights("weights need at least one row, and each row at least one tensor")
        named = {
            (row, index): f"{names[index] if index < len(names) else f'tensor {index}'} of row {row}"
            for row in tensors
            for index in range(len(tensors[row]))
        }
        flat = {key: tensors[key[0]][key[1]].detach() for key in named}
        _require_one_device(flat.values())
        self.num_local_physical_experts = _slot_count(flat, named)
        for key, tensor in flat.items():
            _require_movable(tensor, named[key])
        _require_disjoint(flat, named)
        self.device = next(iter(flat.values())).device
        self._tensors = {row: tuple(flat[row, index] for index in range(len(tensors[row]))) for row in tensors}
        self._views = {row: tuple(_byte_view(tensor) for tensor in self._tensors[row]) for row in tensors}

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the placement that have weights, ascending."""
        return tuple(sorted(self._views))

    def views(self, row: int) -> tuple[Tensor, ...]:
        """Return a row's tensors as uint8 ``[local physical experts, bytes of a slot]``, sharing their memory."""
        return self._views[row]

    def slot_views(self, row: int, slot: int) -> tuple[Tensor, ...]:
        """Return one slot of each tensor of a row as uint8 ``[bytes]``, sharing its memory."""
        return tuple(view.select(0, slot) for view in self._views[row])

    def slot_nbytes(self, row: int) -> tuple[int, ...]:
        """Return the bytes of one slot in each tensor of a row."""
        return tuple(view.shape[1] for view in self._views[row])

    def addresses(self, row: int, slots: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the addresses of slots of a row: int64 ``[slots, tensors]``."""
        # [tensors] each, in bytes
        starts, strides = zip(*((view.data_ptr(), view.stride(0)) for view in self._views[row]), strict=True)
        places = np.array(slots, dtype=np.int64)
        return np.array(starts, dtype=np.int64) + places[:, None] * np.array(strides, dtype=np.int64)

    def shapes(self, row: int) -> list[list[int]]:
        """Return the shape of each of a row's tensors."""
        return [list(tensor.shape) for tensor in self._tensors[row]]

    def with_column(self, columns: Mapping[int, Tensor], name: str) -> "ExpertWeights":
        """Return these weights with one more tensor in each row, which is then moved with the others.

        :param columns: row → tensor ``[local physical experts, ...]``
        :param name: of the tensor, for errors
        :raises InvalidWeights: as the constructor
        """
        extended = {row: (*tensors, columns[row]) for row, tensors in self._tensors.items()}
        width = max(len(tensors) for tensors in extended.values())
        return ExpertWeights(extended, names=[f"tensor {i}" for i in range(width - 1)] + [name])

    def digest(self) -> bytes:
        """Return a hash of 16 bytes of rows, dtypes and shapes of slots: equal on ranks that can exchange slots."""
        layout = [(row, [(str(t.dtype), tuple(t.shape[1:])) for t in self._tensors[row]]) for row in self.rows]
        return hashlib.blake2b(repr(layout).encode(), digest_size=16).digest()


_Key = tuple[int, int]


def _require_one_device(tensors: Iterable[Tensor]) -> None:
    devices = tuple(sorted({str(tensor.device) for tensor in tensors}))
    if len(devices) > 1:
        raise InvalidWeights(f"weights are on {', '.join(devices)}; all tensors of an updater must be on one device")


def _slot_count(tensors: Mapping[_Key, Tensor], names: Mapping[_Key, str]) -> int:
    first = next(iter(tensors.values()))
    if first.ndim == 0:
        raise InvalidWeights(f"{names[next(iter(tensors))]} has no dimensions; the first is the slot")
    for key, tensor in tensors.items():
        actual = tensor.shape[0] if tensor.ndim else 0
        if actual != first.shape[0]:
            raise SlotCountMismatch(
                f"{names[key]} has {actual} slots in its first dimension; {names[next(iter(tensors))]} "
                f"has {first.shape[0]}",
                tensor=names[key],
                expected=first.shape[0],
                actual=actual,
            )
    return first.shape[0]


def _require_movable(tensor: Tensor, name: str) -> None:
    if tensor.shape[0] == 0 or tensor[0].numel() == 0:
        raise InvalidSlot(f"{name} has shape {list(tensor.shape)}: there is nothing to move", tensor=name)
    if tensor.is_sparse or tensor.layout is not torch.strided:
        raise InvalidSlot(f"{name} is not a dense tensor; its slots cannot be moved as bytes", tensor=name)
    if not tensor[0].is_contiguous():
        raise InvalidSlot(
            f"{name} has strides {tensor.stride()}: a slot is not contiguous; lay each expert out in one block",
            tensor=name,
        )
    if tensor.shape[0] > 1 and tensor.stride(0) < tensor[0].numel():
        raise InvalidSlot(
            f"{name} has strides {tensor.stride()}: its slots share memory (an expanded or overlapping view); "
            "give every slot memory of its own",
            tensor=name,
        )


def _require_disjoint(tensors: Mapping[_Key, Tensor], names: Mapping[_Key, str]) -> None:
    """Check that no two slots share a byte, also of different tensors: no slot may begin before the last one ends.

    :raises InvalidSlot: if two slots do
    """
    keys = list(tensors)
    starts, ends, owners = [], [], []
    for number, key in enumerate(keys):
        tensor = tensors[key]
        stride = tensor.stride(0) * tensor.element_size()
        first = tensor.data_ptr() + stride * np.arange(tensor.shape[0], dtype=np.int64)
        starts.append(first)
        ends.append(first + tensor[0].numel() * tensor.element_size())
        owners.append(np.full(tensor.shape[0], number))
    start, end, owner = np.concatenate(starts), np.concatenate(ends), np.concatenate(owners)
    order = np.argsort(start)  # [slots of all tensors]
    overlapping = np.flatnonzero(end[order][:-1] > start[order][1:])
    if len(overlapping):
        one, other = (names[keys[owner[order[overlapping[0] + side]]]] for side in (0, 1))
        raise InvalidSlot(f"a slot of {other} shares memory with a slot of {one}", tensor=other)


def _byte_view(tensor: Tensor) -> Tensor:
    # Rule 8: bytes of the storage, whatever the dtype; torch cannot view every dtype as another.
    size = tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (tensor.shape[0], tensor[0].numel() * size),
        (tensor.stride(0) * size, 1),
    )
