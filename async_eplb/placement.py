"""Immutable placements: which logical expert each physical expert holds, per layer; load and save."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from async_eplb.errors import EplbError, InvalidPlacement
from async_eplb.topology import EPTopology

EMPTY_SLOT = -1
"""Entry of ``physical_to_logical_map`` for a slot without an expert."""

MAP_KEY = "physical_to_logical_map"
LOAD_KEY = "logical_count"

_MOST_EXPERTS = 1 << 20
"""Most logical experts of a model: arrays are as large as this number, so that damaged documents are refused."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """Which logical expert each physical expert holds, in each layer.

    :param physical_to_logical_map: int32 ``[layers, physical]``, read-only; :data:`EMPTY_SLOT` where empty
    :param num_logical_experts: experts of the model, the same in each layer
    :raises InvalidPlacement: if the map is not a table of integers, or names an expert that the model does not have
    """

    physical_to_logical_map: npt.NDArray[np.int32]
    num_logical_experts: int

    def __post_init__(self) -> None:
        table = self.physical_to_logical_map
        if table.ndim != 2 or table.shape[1] == 0:  # noqa: PLR2004
            raise InvalidPlacement(
                f"{MAP_KEY} has shape {list(table.shape)}; it must be [layers, physical experts]",
            )
        if not 0 <= self.num_logical_experts <= _MOST_EXPERTS:
            raise InvalidPlacement(
                f"num_logical_experts is {self.num_logical_experts}; it must be from 0 to {_MOST_EXPERTS}"
            )
        wrong = np.argwhere((table < EMPTY_SLOT) | (table >= self.num_logical_experts))
        if len(wrong):
            layer, physical = (int(index) for index in wrong[0])
            raise InvalidPlacement(
                f"layer {layer}: physical expert {physical} holds logical expert {table[layer, physical]}; "
                f"the model has experts 0 to {self.num_logical_experts - 1}, and {EMPTY_SLOT} means empty"
            )

    @classmethod
    def from_mapping(cls, maps: object, num_logical_experts: int | None = None) -> "ExpertPlacement":
        """Build a placement from nested sequences, an array or a tensor of shape ``[layers, physical]``.

        :param maps: logical experts, :data:`EMPTY_SLOT` where a slot is empty
        :param num_logical_experts: experts of the model; without it, one more than the largest id in ``maps``
        :raises InvalidPlacement: if ``maps`` is not such a table
        """
        try:
            table = on_host(maps)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InvalidPlacement(f"{MAP_KEY} is not a table: {error}") from error
        if table.size and not np.issubdtype(table.dtype, np.integer):
            raise InvalidPlacement(f"{MAP_KEY} holds {table.dtype}; logical experts are integers")
        if table.size and (table.max() > np.iinfo(np.int32).max or table.min() < np.iinfo(np.int32).min):
            raise InvalidPlacement(f"{MAP_KEY} holds numbers beyond 32 bits; logical experts are small integers")
        frozen = np.array(table, dtype=np.int32, order="C")
        frozen.setflags(write=False)
        if num_logical_experts is None:
            num_logical_experts = int(frozen.max(initial=EMPTY_SLOT)) + 1
        return cls(frozen, num_logical_experts)

    @classmethod
    def trivial(cls, num_layers: int, num_physical_experts: int, num_logical_experts: int) -> "ExpertPlacement":
        """Build the initial placement: physical expert ``i`` holds logical expert ``i % num_logical_experts``."""
        row = np.arange(num_physical_experts) % num_logical_experts
        return cls.from_mapping(np.tile(row, (num_layers, 1)), num_logical_experts)

    @classmethod
    def load(cls, source: str | Path, num_logical_experts: int | None = None) -> "ExpertPlacement":
        """Read a placement from a document as serving engines use it.

        :param source: a ``.json`` or ``.pt`` file, or an inline JSON object, that holds
            ``physical_to_logical_map`` as ``[layers, physical]``. Tensors are read without unpickling code.
        :param num_logical_experts: experts of the model; without it, what the document says, else as for
            :meth:`from_mapping`
        :raises InvalidPlacement: if it cannot be read, or holds something else
        """
        document = read_document(source, "a placement", InvalidPlacement)
        if not isinstance(document, Mapping) or MAP_KEY not in document:
            hint = ""
            if isinstance(document, Mapping) and LOAD_KEY in document:
                hint = f"; {LOAD_KEY!r} is a load, from which a policy computes a placement"
            raise InvalidPlacement(f"{describe(source)} holds no {MAP_KEY!r}{hint}")
        declared = document.get("num_logical_experts")
        if declared is not None and type(declared) is not int:
            raise InvalidPlacement(f"num_logical_experts is {declared!r}; it must be a whole number")
        if num_logical_experts is None:
            num_logical_experts = declared
        return cls.from_mapping(document[MAP_KEY], num_logical_experts)

    def save(self, path: str | Path) -> None:
        """Write the placement to a ``.json`` or ``.pt`` file, which :meth:`load` can read.

        :raises InvalidPlacement: if the name of the file ends otherwise
        """
        path = Path(path)
        if path.suffix == ".json":
            document = {
                "num_logical_experts": self.num_logical_experts,
                MAP_KEY: self.physical_to_logical_map.tolist(),
            }
            path.write_text(json.dumps(document))
        elif path.suffix == ".pt":
            import torch  # noqa: PLC0415 - slow to import, and planning needs no tensors

            table = torch.tensor(self.physical_to_logical_map, dtype=torch.int64)
            torch.save({"num_logical_experts": self.num_logical_experts, MAP_KEY: table}, path)
        else:
            raise InvalidPlacement(f"{path.name}: a placement is saved as .json or .pt")

    @property
    def num_layers(self) -> int:
        """Number of layers, the rows of the map."""
        return int(self.physical_to_logical_map.shape[0])

    @property
    def num_physical_experts(self) -> int:
        """Number of physical experts, the columns of the map."""
        return int(self.physical_to_logical_map.shape[1])

    def unplaced(self) -> dict[int, tuple[int, ...]]:
        """Return the logical experts without a replica: layer → experts, for layers that have any."""
        missing = self.replica_counts() == 0
        return {
            int(layer): tuple(int(expert) for expert in np.flatnonzero(missing[layer]))
            for layer in np.flatnonzero(missing.any(axis=1))
        }

    def replica_counts(self) -> npt.NDArray[np.int64]:
        """Count the replicas of each logical expert: int64 ``[layers, logical]``."""
        counts = np.zeros((self.num_layers, self.num_logical_experts), dtype=np.int64)
        layers, physical = np.nonzero(self.physical_to_logical_map != EMPTY_SLOT)
        np.add.at(counts, (layers, self.physical_to_logical_map[layers, physical]), 1)
        return counts

    def require_fit(self, topology: EPTopology) -> None:
        """Check that the map has one column for each slot of the topology.

        :raises InvalidPlacement: if it has not
        """
        if self.num_physical_experts != topology.num_physical_experts:
            raise InvalidPlacement(
                f"the placement has {self.num_physical_experts} physical experts, but {topology.num_ranks} ranks "
                f"of {topology.num_local_physical_experts} slots have {topology.num_physical_experts}",
            )

    def with_layers(self, other: "ExpertPlacement", layers: tuple[int, ...]) -> "ExpertPlacement":
        """Return a copy of this placement in which the rows ``layers`` are those of ``other``."""
        table = self.physical_to_logical_map.copy()
        table[list(layers)] = other.physical_to_logical_map[list(layers)]
        return self.from_mapping(table, self.num_logical_experts)

    def changed_layers(self, other: "ExpertPlacement") -> tuple[int, ...]:
        """Return the rows in which the two placements differ, in ascending order."""
        differs = (self.physical_to_logical_map != other.physical_to_logical_map).any(axis=1)
        return tuple(int(layer) for layer in np.flatnonzero(differs))

    def digest(self) -> bytes:
        """Return a hash of 16 bytes: equal for equal placements, and for practical purposes only for these."""
        content = hashlib.blake2b(digest_size=16)
        content.update(repr((self.physical_to_logical_map.shape, self.num_logical_experts)).encode())
        content.update(self.physical_to_logical_map.tobytes())
        return content.digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertPlacement):
            return NotImplemented
        return self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


def on_host(table: Any) -> npt.NDArray[np.generic]:  # noqa: ANN401 - whatever a caller has
    """Convert nested sequences, an array or a tensor of any device and dtype to an array.

    :raises ValueError: if they are not rectangular
    """
    if hasattr(table, "is_floating_point"):  # a tensor; numpy does not know bfloat16
        table = (table.double() if table.is_floating_point() else table).cpu()
    return np.asarray(table)


def read_document(source: str | Path, what: str, error: type[EplbError]) -> object:
    """Read a JSON document, or a ``.pt`` file without unpickling code.

    :param source: a file name, or an inline JSON object
    :param what: what the document should be, for the message
    :param error: raised if it cannot be read
    """
    try:
        if _is_inline(source):
            return json.loads(str(source))
        path = Path(source)
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".pt":
            import torch  # noqa: PLC0415 - as above

            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as cause:
        raise error(f"{describe(source)} cannot be read: {cause}") from cause
    raise error(f"{source}: {what} is a .json file, a .pt file or an inline JSON object")


def describe(source: str | Path) -> str:
    """Return the name of a source for messages."""
    return "the inline JSON" if _is_inline(source) else str(source)


def _is_inline(source: str | Path) -> bool:
    return isinstance(source, str) and source.lstrip().startswith("{")
