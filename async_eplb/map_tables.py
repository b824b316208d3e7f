"""Tables that maps are published into: an engine's own tensors, or tensors that are made for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.errors import InvalidTable
from async_eplb.slots import first_overlap, memory_fault

WIDE = "logical_to_all_physical_map"
"""The one table whose rows may be wider than what is published."""
_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapTables:
    """Tensors of an engine to publish maps into; None for a table that it does not read.

    Each is int32 or int64 and on the device of the weights, and its last dimension has a stride of 1. They share no
    memory. Rows are replaced in place.

    :param physical_to_logical_map: ``[layers, physical]``
    :param logical_to_all_physical_map: ``[layers, logical, width]``, with a width of the most replicas that an expert
        may have, or more
    :param logical_replica_count: ``[layers, logical]``
    :param logical_to_dispatch_physical_map: ``[layers, logical]``
    """

    physical_to_logical_map: Tensor | None = None
    logical_to_all_physical_map: Tensor | None = None
    logical_replica_count: Tensor | None = None
    logical_to_dispatch_physical_map: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Return the tables that there are, by name."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: table for name, table in tables.items() if table is not None}


Shape = tuple[int, ...]


def require_tables(tables: Mapping[str, Tensor], shapes: Mapping[str, Shape], device: torch.device) -> None:
    """Check that tables can be published into. Nothing is written.

    :param tables: name → table
    :param shapes: name → shape; a table of the name :data:`WIDE` may be wider in its last dimension
    :raises InvalidTable: if one is no plain tensor, has another dtype, shape or device, or shares memory
    """
    for name, table in tables.items():
        fault = next(_faults(table, shapes[name], device, wider=name == WIDE), "")
        if fault:
            raise InvalidTable(f"the table {name} {fault}", table=name)
    blocks = [runs(table) for table in tables.values()]
    owners = [name for name, each in zip(tables, blocks, strict=True) for _ in each]  # [blocks of all tables]
    start, nbytes = np.concatenate([np.zeros((0, 2), dtype=np.int64), *blocks]).T  # [blocks of all tables] each
    if pair := first_overlap(start, nbytes):
        one, other = (owners[place] for place in pair)
        raise InvalidTable(f"rows of the table {other} share memory with rows of {one}", table=other)


def published_part(table: Tensor, shape: Shape) -> Tensor:
    """Return what of a table is published into: a view, written by anybody if it is made outside of modes."""
    part = torch.empty(0, dtype=table.dtype, device=table.device)
    return part.set_(table.untyped_storage(), table.storage_offset(), shape, table.stride())


def runs(view: Tensor) -> npt.NDArray[np.int64]:
    """Return the blocks of memory of a tensor, in the order of its elements: address and bytes, ``[blocks, 2]``.

    :param view: its last dimension has a stride of 1
    """
    if view.is_contiguous():
        return np.array([[view.data_ptr(), view.nbytes]], dtype=np.int64)
    starts = np.array(view.data_ptr(), dtype=np.int64)  # [leading dimensions ...]
    for size, stride in zip(view.shape[:-1], view.stride(), strict=False):
        starts = starts[..., None] + np.arange(size, dtype=np.int64) * (stride * view.itemsize)
    return np.stack([starts.ravel(), np.full(starts.size, view.shape[-1] * view.itemsize)], axis=1)


def _faults(table: object, shape: Shape, device: torch.device, *, wider: bool) -> Iterator[str]:
    """Yield what keeps a table from being published into; the first is to be told, for others may follow from it."""
    if not isinstance(table, Tensor):
        yield f"is of type {type(table).__name__}; give a tensor"
    elif fault := memory_fault(table):
        yield fault
    elif table.dtype not in _DTYPES:
        yield f"is {table.dtype}; it must be int32 or int64"
    elif table.device != device:
        yield f"is on {table.device}, and maps are published on {device}"
    elif table.shape[:-1] != shape[:-1] or not (
        table.shape[-1] == shape[-1] or (wider and table.shape[-1] > shape[-1])
    ):
        least = " or wider" if wider else ""
        yield f"has the shape {list(table.shape)}; it must be {list(shape)}{least}"
    elif table.stride(-1) != 1 and table.shape[-1] > 1:
        yield f"has strides {table.stride()}; the last must be 1"
