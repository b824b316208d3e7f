"""Live expert weights of a rank: slots of any dtype and layout as bytes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from numbers import Integral

import numpy as np
import numpy.typing as npt
from torch import Tensor

from async_eplb.errors import InvalidSlot, InvalidWeights, MovedWeights, SlotCountMismatch
from async_eplb.slots import SlotTensor, first_overlap, is_list, moved, slot_tensor

Slots = Tensor | Sequence[Tensor]
"""One tensor of a row: ``[local physical experts, ...]``, or a list of one tensor for each local physical expert."""

_MOST_NAMES = 5
"""Names in a message; the error has all of them."""


class ExpertWeights:
    """Byte views of the routed expert weights of a rank. They share the memory of the caller's tensors.

    What is moved of a slot is its extent: all bytes from its first element to its last. So dimensions may lie in any
    order, and padding inside a slot moves along; gaps between slots stay as they are. Of a tensor that is distributed
    (a DTensor) the local part is used. A tensor that gets other memory later (``p.data = ...``) is noticed if it is
    the one that was given, such as the parameter itself, not a view of it.

    :param tensors: row of the placement → its tensors, of any dtypes, each ``[local physical experts, ...]`` or, where
        every expert has a tensor of its own, a list of these: ``{0: [w13, [w2_of_slot_0, w2_of_slot_1]]}``
    :param names: of the tensors of a row, in order, for errors
    :raises InvalidSlot: if a tensor is none, has no memory of its own, or slots of it are expanded or share memory
    :raises SlotCountMismatch: if tensors have different numbers of slots
    :raises InvalidWeights: if rows are no mapping of row to tensors, tensors are on several devices, or there is
        nothing to move
    """

    def __init__(self, tensors: Mapping[int, Sequence[Slots]], *, names: Sequence[str] = ()) -> None:
        rows = _rows(tensors)
        if not is_list(names) or not all(isinstance(name, str) for name in names):
            raise InvalidWeights("names are no list of texts; give one for each tensor of a row")
        self.tensors: dict[int, tuple[SlotTensor, ...]] = {}
        """Row → its tensors, as a block of memory for each slot."""
        first: SlotTensor | None = None
        for row, given in rows.items():
            for index, each in enumerate(given):
                name = f"{names[index] if index < len(names) else f'tensor {index}'} of row {row}"
                tensor = slot_tensor(each, name, device=None if first is None else first.device)
                first = first or tensor
                _require_as_many_slots(tensor, first)
                self.tensors[row] = (*self.tensors.get(row, ()), tensor)
        every = [tensor for tensors in self.tensors.values() for tensor in tensors]
        _require_disjoint(every)
        self.num_local_physical_experts = every[0].num_slots
        self.device = every[0].device

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the placement that have weights, ascending."""
        return tuple(sorted(self.tensors))

    def slot_views(self, row: int, slot: int) -> tuple[Tensor, ...]:
        """Return one slot of each tensor of a row as uint8 ``[extent]``, sharing its memory."""
        return tuple(tensor.views[slot] for tensor in self.tensors[row])

    def slot_elements(self, row: int, slot: int) -> tuple[Tensor, ...]:
        """Return the elements of one slot of each tensor of a row, in the order of its dimensions and without padding.

        :returns: uint8 ``[*shape of the slot, bytes of an element]`` each, sharing the slot's memory
        """
        return tuple(tensor.elements(slot) for tensor in self.tensors[row])

    def slot_nbytes(self, row: int) -> tuple[int, ...]:
        """Return the bytes of one slot, its extent, in each tensor of a row."""
        return tuple(tensor.layout.nbytes for tensor in self.tensors[row])

    def addresses(self, row: int, slots: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the addresses of slots of a row: int64 ``[slots, tensors]``."""
        places = np.array(slots, dtype=np.int64)
        return np.stack([tensor.addresses[places] for tensor in self.tensors[row]], axis=1)

    def shapes(self, row: int) -> list[list[int]]:
        """Return the shape of each of a row's tensors, the slot first."""
        return [[tensor.num_slots, *tensor.layout.shape] for tensor in self.tensors[row]]

    def with_column(self, columns: Mapping[int, Tensor], name: str) -> "ExpertWeights":
        """Return these weights with one more tensor in each row, which is then moved with the others.

        :param columns: row → tensor ``[local physical experts, ...]`` in memory of its own
        :param name: of the tensor, for errors
        :raises InvalidWeights: as the constructor
        """
        extended = copy(self)
        extended.tensors = {
            row: (*tensors, slot_tensor(columns[row], f"{name} of row {row}", device=self.device))
            for row, tensors in self.tensors.items()
        }
        return extended

    def digest(self) -> bytes:
        """Return a hash of 16 bytes of rows and layouts of slots: equal on ranks that can exchange slots (rule 23)."""
        layouts = [(row, [tensor.layout for tensor in self.tensors[row]]) for row in self.rows]
        return hashlib.blake2b(json.dumps(layouts).encode(), digest_size=16).digest()

    def require_in_place(self) -> None:
        """Check that the tensors that were given are where they were then (rule 22).

        :raises MovedWeights: if some are not, or have lost their memory
        """
        found = {row: moved(self.tensors[row]) for row in self.rows}
        names = tuple(name for row in found.values() for name in row)
        if names:
            raise MovedWeights(
                f"live weights are not where they were: {', '.join(names[:_MOST_NAMES])} ({len(names)} tensors); give "
                "the new ones to rebind() inside paused()",
                tensors=names,
                layers=tuple(row for row in found if found[row]),
            )

    def require_alike(self, other: "ExpertWeights") -> None:
        """Check that other weights can take the place of these: equal rows, layouts, number of slots and device.

        :raises InvalidWeights: if not
        """
        require_weights(other)
        if other.device != self.device:
            raise InvalidWeights(f"the new weights are on {other.device}, the ones before on {self.device}")
        if other.rows != self.rows:
            raise InvalidWeights(
                f"the new weights are for rows {list(other.rows)}, the ones before for {list(self.rows)}"
            )
        for row in self.rows:
            before, now = (
                [(tensor.num_slots, *tensor.layout) for tensor in each.tensors[row]] for each in (self, other)
            )
            if before != now:
                raise InvalidWeights(
                    f"the new weights of row {row} are laid out as {now}, the ones before as {before} (slots, "
                    "then dtype, bytes of an element, shape and strides of a slot)"
                )


def require_weights(given: object) -> None:
    """Check that something is live weights, and not the tensors that they are made of.

    :raises InvalidWeights: if not
    """
    if not isinstance(given, ExpertWeights):
        raise InvalidWeights(f"weights are a {type(given).__name__}; give ExpertWeights(tensors)")


def _rows(tensors: object) -> dict[int, Sequence[object]]:
    """Return what is given for each row.

    :raises InvalidWeights: if it is no mapping of numbers of rows to lists
    """
    if not isinstance(tensors, Mapping):
        raise InvalidWeights(
            f"weights are a {type(tensors).__name__}; give a mapping of row to tensors, such as dict(enumerate(rows))"
        )
    rows: dict[int, Sequence[object]] = {}
    for row, given in tensors.items():
        if isinstance(row, bool) or not isinstance(row, Integral) or row < 0:
            what = row if isinstance(row, int) else f"of type {type(row).__name__}"
            raise InvalidWeights(f"weights are given for a row {what}; rows are numbers from 0")
        if not is_list(given):
            raise InvalidWeights(f"row {row} is a {type(given).__name__}; give a list of its tensors")
        rows[int(row)] = given
    if not rows or not all(len(given) for given in rows.values()):
        raise InvalidWeights("weights need at least one row, and each row at least one tensor")
    return rows


def _require_as_many_slots(tensor: SlotTensor, first: SlotTensor) -> None:
    if tensor.num_slots != first.num_slots:
        raise SlotCountMismatch(
            f"{tensor.name} has {tensor.num_slots} slots, {first.name} has {first.num_slots}; slots are the first "
            "dimension of a tensor, or a list inside the row's list that has a tensor for each slot",
            tensor=tensor.name,
            expected=first.num_slots,
            actual=tensor.num_slots,
        )


def _require_disjoint(tensors: Sequence[SlotTensor]) -> None:
    """Check that no two slots share a byte, also of different tensors.

    :raises InvalidSlot: if two slots do
    """
    start = np.concatenate([tensor.addresses for tensor in tensors])  # [slots of all tensors]
    nbytes = np.repeat([tensor.layout.nbytes for tensor in tensors], [tensor.num_slots for tensor in tensors])
    if pair := first_overlap(start, nbytes):
        one, other = (tensors[number // tensors[0].num_slots].name for number in pair)
        what = (
            f"slots of {one} share memory or lie inside each other"
            if one == other
            else (f"a slot of {other} shares memory with a slot of {one}, or lies inside it")
        )
        raise InvalidSlot(f"{what}; give every slot a block of its own", tensor=other)
