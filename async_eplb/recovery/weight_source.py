"""Where the bytes of an expert come from that no rank holds any more: a checkpoint."""

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from async_eplb.arguments import Whole, take
from async_eplb.errors import EplbError, InvalidOptions, InvalidWeightSource

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
    :param convert: called with the number of each tensor, the tensor that was made, and the logical expert; returns
        the expert's. For quantised layouts of the engine's own, and for checkpoints of ``[experts, ...]`` tensors,
        whose patterns have no ``{expert}``: ``lambda number, tensor, expert: tensor[expert]``
    :raises InvalidOptions: if a pattern has anything else in braces, or, without ``convert``, no ``{expert}``
    :raises EplbError: if the extra ``checkpoint`` is not installed
    :raises InvalidWeightSource: if there is no checkpoint, it cannot be read, or has a tensor in two files
    """

    def __init__(
        self,
        folder: str | Path,
        patterns: Sequence[str | Sequence[str]],
        *,
        first_layer: int = 0,
        convert: Callable[[int, Tensor, int], Tensor] | None = None,
    ) -> None:
        try:
            from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise EplbError(
                "reading safetensors needs the extra 'checkpoint': pip install 'async-eplb[checkpoint]'"
            ) from error
        self._open = safe_open
        self._unreadable = (OSError, ValueError, SafetensorError)
        self._patterns = _checked(patterns, fused=convert is not None)
        self._first_layer = take(first_layer, Whole(0), "first_layer", InvalidOptions)
        self._convert = convert or (lambda _number, tensor, _expert: tensor)
        self._files = self._find(Path(folder))

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert's tensors."""
        tensors = []
        for number, names in enumerate(self._patterns):
            parts = [self._read(name, layer, logical_expert) for name in names]
            tensors.append(self._convert(number, torch.cat(parts) if len(parts) > 1 else parts[0], logical_expert))
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
                return _named_in(json.loads(path.read_text(), object_pairs_hook=_once), folder)
            for path in sorted(folder.glob("*.safetensors")):
                with self._open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no dict
                        _add(found, name, path)
        except (RecursionError, *self._unreadable) as error:
            raise InvalidWeightSource(f"{path} cannot be read: {error}", layer=-1, logical_expert=-1) from error
        if not found:
            raise InvalidWeightSource(f"{folder} holds no safetensors files", layer=-1, logical_expert=-1)
        return found


def _checked(patterns: Sequence[str | Sequence[str]], *, fused: bool) -> list[tuple[str, ...]]:
    """Return the names that each tensor is made of, with their braces.

    :param fused: whether a tensor may be that of all experts
    :raises InvalidOptions: if these are no such names
    """
    try:
        groups = [(names,) if isinstance(names, str) else tuple(names) for names in patterns]
        made = {name: [name.format(layer=0, expert=expert) for expert in (0, 1)] for name in chain(*groups)}
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise _no_patterns(patterns, repr(error)) from error
    alike = [name for name, (one, other) in made.items() if one == other]
    if alike and not fused:
        raise _no_patterns(patterns, f"{alike[0]!r} is the same for all experts, of which convert takes one")
    if isinstance(patterns, str) or not groups or not all(groups):
        raise _no_patterns(patterns, "each tensor of a layer has one name or several")
    return groups


def _no_patterns(patterns: object, reason: str) -> InvalidOptions:
    return InvalidOptions(
        f"patterns is {patterns!r}; it must be names in the checkpoint with {{layer}} and {{expert}} in them, for each "
        f"tensor of a layer ({reason})",
        option="patterns",
    )


def _add(found: dict[str, Any], name: str, file: object) -> None:
    """Add the file that a tensor is in.

    :raises ValueError: if it is in another one as well
    """
    if name in found and found[name] != file:
        raise ValueError(f"{name!r} is in {found[name]} and in {file}; it is not clear which is meant")
    found[name] = file


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        _add(found, name, value)
    return found


def _named_in(index: object, folder: Path) -> dict[str, Path]:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError('it has no "weight_map" of names to files')
    return {name: folder / file for name, file in names.items()}
