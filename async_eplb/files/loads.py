"""Loads in files: of this package, SGLang's recorder, vLLM's statistics, and DeepSeek's weights."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from async_eplb.errors import InvalidLoad
from async_eplb.files.documents import (
    LOAD_KEY,
    MAP_KEY,
    VERSION,
    Forms,
    describe,
    ending,
    entry,
    is_inline,
    read_document,
    require_version,
    told_as,
)
from async_eplb.files.tables import folded, integers, numbers

_AXES = ["stages", "layers", "experts"]
_TOKENS_KEY = "tokens"
_RECORDS_KEY = "records"
_LAST_MAP_KEY = "last_physical_to_logical_map"
_STATISTICS_KEY = "expert_load"


class LoadTable(NamedTuple):
    """A load as a file has it.

    :param counts: tokens, ``[layers, logical]`` or ``[steps, layers, logical]``
    :param num_steps: what the file says; None if it does not
    :param phase: kind of the steps
    """

    counts: object
    num_steps: int | None = None
    phase: str | None = None


def read_load(source: str | Path) -> LoadTable:
    """Read a file, or a folder of dumps that all ranks have written of the same passes.

    :raises InvalidLoad: if it cannot be read, or holds something else
    """
    with told_as(InvalidLoad, f"{describe(source)} cannot be read"):
        if not is_inline(source) and Path(source).is_dir():
            paths = sorted(path for path in Path(source).iterdir() if ending(path) == ".pt")
            return LoadTable(_of_passes([read_document(path, InvalidLoad) for path in paths]))
    return LOADS.read(source)


def write_load(path: Path, tokens: npt.NDArray[Any], num_steps: int, phase: str | None) -> None:
    """Write a load of one stage.

    :param tokens: ``[layers, logical]``
    :raises InvalidLoad: if the name of the file ends otherwise than in ``.json`` or ``.npz``
    """
    about: dict[str, Any] = {"version": VERSION, "axes": _AXES, "num_steps": [num_steps], "phase": phase or ""}
    if ending(path) == ".json":
        path.write_text(json.dumps({**about, _TOKENS_KEY: [tokens.tolist()]}))
    elif ending(path) == ".npz":
        with path.open("wb") as file:
            np.savez_compressed(file, **about | {_TOKENS_KEY: tokens[None]})
    else:
        raise InvalidLoad(f"{path.name}: a load is saved as .json or .npz")


def _own(document: Mapping[Any, Any]) -> LoadTable:
    """Read what this package writes; stages are added up."""
    require_version(document)
    axes = list(entry(document, "axes"))
    if axes != _AXES:
        raise ValueError(f"axes are {axes}; they must be {_AXES}")
    tokens = numbers(document[_TOKENS_KEY], 3, _TOKENS_KEY)  # [stages, layers, experts]
    num_steps = integers(entry(document, "num_steps"), 1, "num_steps")  # [stages]
    if len(num_steps) != len(tokens) or (num_steps < 1).any():
        raise ValueError(f"num_steps is {num_steps.tolist()}; it must have 1 or more for each of {len(tokens)} stages")
    phase = document.get("phase") or None
    if not isinstance(phase, str | None):
        raise ValueError(f"phase is {phase!r}; it must be a name")  # noqa: TRY004
    return LoadTable(tokens, sum(num_steps.tolist()), phase)


def _of_passes(dumps: list[object]) -> npt.NDArray[Any]:
    """Add up the ranks of SGLang's dumps of single passes: ``[passes, layers, logical]``.

    Counts of physical experts are folded with the map that a dump ends with, as SGLang does.
    """
    maps = [integers(entry(dump, _LAST_MAP_KEY), 2, _LAST_MAP_KEY) for dump in dumps]
    if not maps:
        raise ValueError("it is a folder without dumps (.pt)")
    if any(not np.array_equal(each, maps[0]) for each in maps):
        raise ValueError("its dumps end with different maps, so that they are not of the same passes")
    counts: defaultdict[int, Any] = defaultdict(int)  # pass → [layers, physical]
    seen = set()
    for dump in dumps:
        for record in entry(dump, _RECORDS_KEY):
            number, rank = entry(record, "forward_pass_id"), entry(record, "rank")
            part = (number, rank, record.get("gatherer_key"))
            if part in seen:
                raise ValueError(f"it has pass {number} of rank {rank} twice")
            seen.add(part)
            of_rank = integers(entry(record, "global_physical_count"), 2, "global_physical_count")
            if of_rank.shape != maps[0].shape:
                raise ValueError(f"counts of pass {number} are {list(of_rank.shape)}, the map {list(maps[0].shape)}")
            counts[number] = counts[number] + of_rank
    if not counts:
        raise ValueError("it has no pass")
    return folded(np.stack(list(counts.values())), maps[0], int(maps[0].max(initial=-1)) + 1)


def _statistics(records: object) -> LoadTable:
    """Read vLLM's statistics, one record for each recorded pass; other records are about the run."""
    if not isinstance(records, list):
        raise ValueError("it is a table of no layers")  # noqa: TRY004
    of_passes = [record for record in records if isinstance(record, Mapping) and _STATISTICS_KEY in record]
    maps = [integers(entry(record, "p2l_map"), 2, "p2l_map") for record in of_passes]
    counts = [numbers(record[_STATISTICS_KEY], 2, _STATISTICS_KEY) for record in of_passes]
    num_logical = max(int(each.max(initial=-1)) for each in maps) + 1
    passes = [folded(count[None], each, num_logical)[0] for count, each in zip(counts, maps, strict=True)]
    return LoadTable(np.stack(passes))


def _bare(document: object) -> LoadTable:
    """Read DeepSeek's weights, or a window of loads; or lines of statistics."""
    if isinstance(document, list) and any(isinstance(line, Mapping) for line in document):
        return _statistics(document)
    return LoadTable(document)


LOADS = Forms(
    by_key={
        LOAD_KEY: lambda document: LoadTable(document[LOAD_KEY]),
        _TOKENS_KEY: _own,
        _RECORDS_KEY: lambda document: LoadTable(_of_passes([document])),
        _STATISTICS_KEY: lambda document: _statistics([document]),
    },
    bare=_bare,
    expected=(
        f'{{"{LOAD_KEY}": [layers, logical] or [steps, layers, logical]}}, such a table of numbers alone, a dump of '
        "single passes by SGLang, statistics of vLLM, or what ExpertLoad.save writes"
    ),
    others={MAP_KEY: "a placement, which needs no load"},
    error=InvalidLoad,
)
"""How files hold loads."""
