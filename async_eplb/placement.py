"""Immutable placements: which logical expert each physical expert holds, per layer; load and save."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from async_eplb.arguments import Whole, settle, take
from async_eplb.errors import InvalidPlacement
from async_eplb.files.documents import MAP_KEY, VERSION, ending
from async_eplb.files.placements import PLACEMENTS
from async_eplb.files.tables import on_host
from async_eplb.topology import EPTopology

EMPTY_SLOT = -1
"""Entry of ``physical_to_logical_map`` for a slot without an expert."""

_MOST_EXPERTS = 1 << 20
"""Most logical experts of a model: arrays are as large as this number, so that damaged documents are refused."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """Which logical expert each physical expert holds, in each layer.

    :param physical_to_logical_map: integers ``[layers, physical]``, :data:`EMPTY_SLOT` where empty; kept as a copy,
        int32 and read-only
    :param num_logical_experts: experts of the model, the same in each layer
    :raises InvalidPlacement: if the map is not a table of integers, or names an expert that the model does not have
    """

    physical_to_logical_map: npt.NDArray[np.int32]
    num_logical_experts: int

    def __post_init__(self) -> None:
        table = _canonical(self.physical_to_logical_map)
        object.__setattr__(self, "physical_to_logical_map", table)
        settle(self, InvalidPlacement, num_logical_experts=Whole(0, _MOST_EXPERTS))
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
        table = _canonical(maps)
        if num_logical_experts is None:
            num_logical_experts = int(table.max(initial=EMPTY_SLOT)) + 1
        return cls(table, num_logical_experts)

    @classmethod
    def trivial(cls, num_layers: int, num_physical_experts: int, num_logical_experts: int) -> "ExpertPlacement":
        """Build the initial placement: physical expert ``i`` holds logical expert ``i % num_logical_experts``.

        :raises InvalidPlacement: if a number is no whole one, or there is no expert
        """
        layers = take(num_layers, Whole(0, _MOST_EXPERTS), "num_layers", InvalidPlacement)
        physical = take(num_physical_experts, Whole(1, _MOST_EXPERTS), "num_physical_experts", InvalidPlacement)
        logical = take(num_logical_experts, Whole(1, _MOST_EXPERTS), "num_logical_experts", InvalidPlacement)
        return cls(np.tile(np.arange(physical) % logical, (layers, 1)), logical)

    @classmethod
    def load(cls, source: str | Path, num_logical_experts: int | None = None) -> "ExpertPlacement":
        """Read a placement from a file of this package or of a serving engine. Nothing in a file is run.

        :param source: a ``.json``, ``.jsonl``, ``.npz``, ``.pt``, ``.pth`` or ``.yaml`` file, or an inline JSON object:
            ``physical_to_logical_map`` as ``[layers, physical]`` (this package, SGLang); such a table alone (DeepSeek,
            vLLM), also as ``[layers, ranks, slots]``; ``layer_list`` (vllm-ascend); ``initial_global_assignments``
            (TensorRT-LLM, vLLM), whose rows are in ascending order of layers
        :param num_logical_experts: experts of the model; without it, what the document says, else as for
            :meth:`from_mapping`
        :raises InvalidPlacement: if it cannot be read, or holds something else
        :raises MissingExtra: for YAML without PyYAML (extra ``yaml``)
        """
        table = PLACEMENTS.read(source)
        declared = table.num_logical_experts if num_logical_experts is None else num_logical_experts
        return cls.from_mapping(table.maps, declared)

    def save(self, path: str | Path) -> None:
        """Write the placement to a ``.json`` or ``.pt`` file, which :meth:`load` can read.

        :raises InvalidPlacement: if the name of the file ends otherwise
        """
        path = Path(path)
        document = {"version": VERSION, "num_logical_experts": self.num_logical_experts}
        if ending(path) == ".json":
            path.write_text(json.dumps({**document, MAP_KEY: self.physical_to_logical_map.tolist()}))
        elif ending(path) == ".pt":
            import torch  # noqa: PLC0415 - slow to import, and planning needs no tensors

            table = torch.tensor(self.physical_to_logical_map, dtype=torch.int64, device="cpu")
            torch.save({**document, MAP_KEY: table}, path)
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
        for numbers in ([*self.physical_to_logical_map.shape, self.num_logical_experts], self.physical_to_logical_map):
            content.update(np.asarray(numbers, dtype="<i4").tobytes())
        return content.digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertPlacement):
            return NotImplemented
        return self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


def _canonical(maps: object) -> npt.NDArray[np.int32]:
    """Return nested sequences, an array or a tensor as a map: a read-only copy ``[layers, physical]``.

    :raises InvalidPlacement: if ``maps`` is not a table of integers
    """
    try:
        table = on_host(maps)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidPlacement(f"{MAP_KEY} is not a table: {error}") from error
    if table.ndim != 2 or table.shape[1] == 0:  # noqa: PLR2004
        raise InvalidPlacement(f"{MAP_KEY} has shape {list(table.shape)}; it must be [layers, physical experts]")
    if table.size and not np.issubdtype(table.dtype, np.integer):
        raise InvalidPlacement(f"{MAP_KEY} holds {table.dtype}; logical experts are integers")
    if table.size and (table.max() > np.iinfo(np.int32).max or table.min() < np.iinfo(np.int32).min):
        raise InvalidPlacement(f"{MAP_KEY} holds numbers beyond 32 bits; logical experts are small integers")
    frozen = np.array(table, dtype=np.int32, order="C")
    frozen.setflags(write=False)
    return frozen
