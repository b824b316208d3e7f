"""Where the bytes of an expert come from that no rank holds any more: a checkpoint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.errors import EplbError, InvalidWeightSource

INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Holds every expert of the model. Used from a worker thread, by one at a time."""

    def load(self, layer: int, logical_expert: int) -> Sequence[Tensor]:
        """Return an expert in the shape of a slot: one CPU tensor for each of the layer's, with as many bytes.

        Where a slot is not in row-major order, shapes must be equal, and elements go where they belong.

        :param layer: row of the placement
        :raises InvalidWeightSource: if the source does not hold it
        """
        ...


class SafetensorsSource:
    """Reads experts from a folder of safetensors files, and of these only what is asked for.

    :param folder: with ``*.safetensors`` and, if there are several, their index
    :param patterns: for each of a layer's tensors, in order, the names in the checkpoint that it is made of, with
        ``{layer}`` and ``{expert}`` in them; several names are concatenated along the first dimension, as gate and
        up projections are
    :param first_layer: what ``{layer}`` is for row 0 of the placement, as models whose first layers are dense need
    :param convert: applied to each tensor that was made, with its number; for quantised layouts of the engine's own
    :raises EplbError: if the extra ``checkpoint`` is not installed
    :raises InvalidWeightSource: if there is no checkpoint, or it cannot be read
    """

    def __init__(
        self,
        folder: str | Path,
        patterns: Sequence[str | Sequence[str]],
        *,
        first_layer: int = 0,
        convert: Callable[[int, Tensor], Tensor] = lambda _number, tensor: tensor,
    ) -> None:
        try:
            from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise EplbError(
                "reading safetensors needs the extra 'checkpoint': pip install 'async-eplb[checkpoint]'"
            ) from error
        self._open = safe_open
        self._unreadable = (OSError, ValueError, SafetensorError)
        self._patterns = [(pattern,) if isinstance(pattern, str) else tuple(pattern) for pattern in patterns]
        self._first_layer = first_layer
        self._convert = convert
        self._files = self._find(Path(folder))

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert's tensors."""
        tensors = []
        for number, names in enumerate(self._patterns):
            parts = [self._read(name, layer, logical_expert) for name in names]
            tensors.append(self._convert(number, torch.cat(parts) if len(parts) > 1 else parts[0]))
        return tensors

    def _read(self, pattern: str, layer: int, expert: int) -> Tensor:
        name = pattern.format(layer=self._first_layer + layer, expert=expert)
        try:
            with self._open(self._files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (KeyError, *self._unreadable) as error:
            raise InvalidWeightSource(
                f"layer {layer}: the checkpoint holds no {name!r} for logical expert {expert} ({error})",
                layer=layer,
                logical_expert=expert,
            ) from error
        return tensor

    def _find(self, folder: Path) -> dict[str, Path]:
        path = folder / INDEX
        found: dict[str, Path] = {}
        try:
            if path.is_file():
                return _named_in(json.loads(path.read_text()), folder)
            for path in sorted(folder.glob("*.safetensors")):
                with self._open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
        except (RecursionError, *self._unreadable) as error:
            raise InvalidWeightSource(f"{path} cannot be read: {error}", layer=-1, logical_expert=-1) from error
        if not found:
            raise InvalidWeightSource(f"{folder} holds no safetensors files", layer=-1, logical_expert=-1)
        return found


def _named_in(index: object, folder: Path) -> dict[str, Path]:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError('it has no "weight_map" of names to files')
    return {name: folder / file for name, file in names.items()}
