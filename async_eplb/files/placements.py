"""Placements in files: of this package and SGLang, vLLM, vllm-ascend, TensorRT-LLM and DeepSeek."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from async_eplb.errors import InvalidPlacement
from async_eplb.files.documents import ASSIGNMENTS_KEY, LOAD_KEY, MAP_KEY, Forms, entry, require_version
from async_eplb.files.tables import integers, on_host

_EMPTY = -1


class PlacementTable(NamedTuple):
    """A placement as a file has it.

    :param maps: logical experts ``[layers, physical]``
    :param num_logical_experts: what the file says; None if it does not
    """

    maps: object
    num_logical_experts: int | None = None


def _mapping(document: Mapping[Any, Any]) -> PlacementTable:
    """Read what this package writes, and what SGLang starts with (``--init-expert-location``)."""
    require_version(document)
    declared = document.get("num_logical_experts")
    if declared is not None and type(declared) is not int:
        raise ValueError(f"num_logical_experts is {declared!r}; it must be a whole number")
    return PlacementTable(document[MAP_KEY], declared)


def _assignments(document: Mapping[Any, Any]) -> PlacementTable:
    """Read TensorRT-LLM's configuration of its load balancer, and vLLM's initial mapping, which has the same key.

    They have the model's numbers of layers → logical experts; rows are in ascending order of layers.
    """
    assignments = document[ASSIGNMENTS_KEY]
    if not isinstance(assignments, Mapping) or not assignments:
        raise ValueError(f"{ASSIGNMENTS_KEY} must be an object: layer → logical experts of all slots")
    rows = [assignments[layer] for layer in sorted(assignments, key=int)]
    for row in rows:
        if not isinstance(row, Sequence) or not all(type(expert) is int for expert in row):
            raise ValueError(f"a layer of {ASSIGNMENTS_KEY} is no list of logical experts")
    return PlacementTable(rows)


def _devices(document: Mapping[Any, Any]) -> PlacementTable:
    """Read vllm-ascend's map: a list of layers, each a list of devices with their experts.

    Devices that have fewer experts than others get empty slots.
    """
    layers = _in_order(document, "layer_list", "layer_id", count=document.get("moe_layer_count"))
    devices = [
        [
            entry(device, "device_expert")
            for device in _in_order(layer, "device_list", "device_id", count=layer.get("device_count"))
        ]
        for layer in layers
    ]
    width = max((len(experts) for layer in devices for experts in layer), default=0)
    return PlacementTable(
        [[slot for experts in layer for slot in (*experts, *[_EMPTY] * (width - len(experts)))] for layer in devices]
    )


def _in_order(document: object, key: str, number: str, *, count: object) -> list[Mapping[Any, Any]]:
    """Return a list of objects, whose numbers, where they have any, must ascend: engines read them by place."""
    items = entry(document, key)
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{key} must be a list of objects")
    numbers = [item[number] for item in items if number in item]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise ValueError(f"{key} is not in ascending order of {number}")
    if count is not None and count != len(items):
        raise ValueError(f"{key} has {len(items)} entries, and the file says {count}")
    return items


def _bare(document: object) -> PlacementTable:
    """Read a table alone: DeepSeek's ``phy2log``, which vLLM has too, or vLLM's expert maps of all ranks.

    That is ``[layers, physical]`` or ``[layers, ranks, slots]``; or ``[layers, ranks, experts]`` with the local slot of
    each expert, which is -1 for experts that a rank has not.
    """
    table = on_host(document)
    if table.ndim == 3:  # noqa: PLR2004
        slots = integers(table, 3, "it")
        table = _of_expert_maps(slots) if (slots < 0).any() else slots.reshape(len(slots), -1)
    maps = integers(table, 2, "it")
    if maps.size and maps.max() >= maps.shape[1]:
        raise ValueError(
            f"it names logical expert {maps.max()}, and has {maps.shape[1]} slots, in which no model of so many fits; "
            "if it is a load, ExpertLoad.load reads it"
        )
    return PlacementTable(maps)


def _of_expert_maps(slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the placement of expert maps: ``[layers, physical]``.

    :param slots: local slot of each expert, -1 if a rank has it not: ``[layers, ranks, experts]``
    """
    num_layers, num_ranks, num_experts = slots.shape
    num_slots = int(slots.max()) + 1
    if num_slots > num_experts:
        raise ValueError(f"a rank has {num_slots} slots for {num_experts} experts")
    maps = np.full((num_layers, num_ranks, num_slots), _EMPTY, dtype=np.int64)
    layers, ranks, experts = np.nonzero(slots >= 0)  # [held] each
    maps[layers, ranks, slots[layers, ranks, experts]] = experts
    if (maps != _EMPTY).sum() != len(experts):
        raise ValueError("a rank has two experts in one slot")
    return maps.reshape(num_layers, -1)


PLACEMENTS = Forms(
    by_key={MAP_KEY: _mapping, ASSIGNMENTS_KEY: _assignments, "layer_list": _devices},
    bare=_bare,
    expected=(
        f'{{"{MAP_KEY}": [layers, physical]}}, a table of these numbers alone, "{ASSIGNMENTS_KEY}" as TensorRT-LLM '
        'has it, or "layer_list" as vllm-ascend has it'
    ),
    others={LOAD_KEY: "a load, from which a policy computes a placement", "records": "a load likewise"},
    error=InvalidPlacement,
)
"""How files hold placements."""
