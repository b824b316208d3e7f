"""Keys of events that a report reads, and their values as columns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import (
    LINK_NBYTES,
    FenceWaited,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
    LogDropped,
    PassesTimed,
    RebalanceEvaluated,
    RebalanceFinished,
    UpdateFailed,
    UpdateFinished,
    UpdateStarted,
)
from async_eplb.events.stages import STAGES

Table = dict[str, NDArray[Any]]
"""Columns of equal length, by name; rows in no particular order."""

_CHUNK = 1 << 15
_ANY = (-(1 << 62), 1 << 62)
_BOUNDS = {
    "generation": (0, 1 << 38),
    "step": (0, 1 << 38),
    "layer": (0, 1 << 20),
    "rank": (0, 1 << 14),
    "num_ranks": (1, 1 << 14),
    "num_nodes": (1, 1 << 14),
    "num_layers": (0, 1 << 20),
    "num_unchanged_layers": (0, 1 << 20),
    "num_passes_by_time": (0, 1 << 38),
}
"""Least value and limit of numbers that size arrays: a damaged line must not exhaust memory."""

COMMON = {"run_id": "int", "generation": "int", "rank": "int", "step": "int", "monotonic_s": "float", "wall_s": "float"}
_LAYER = {**COMMON, "layer": "int", "duration_ms": "float"}
_BYTES = dict.fromkeys(LINK_NBYTES, "int")
_TIMES = dict.fromkeys(("duration_ms", *(stage.total for stage in STAGES), "overlap"), "float")

COLUMNS: dict[str, dict[str, str]] = {
    UpdateStarted.name: {
        **COMMON,
        "mode": "str",
        **dict.fromkeys(("num_ranks", "num_nodes", "num_layers", "num_unchanged_layers"), "int"),
    },
    LayerPlanned.name: _LAYER,
    LayerTransferred.name: {
        **_LAYER,
        "copied_nbytes": "int",
        **_BYTES,
        "sent_to_ranks": "ints",
        "sent_nbytes_by_rank": "ints",
        "received_from_ranks": "ints",
        "received_nbytes_by_rank": "ints",
    },
    LayerCommitted.name: {**_LAYER, "copy_ms": "float", "wait_ms": "float", "nbytes": "int"},
    UpdateFinished.name: {**COMMON, **_TIMES, "num_layers": "int", **_BYTES},
    UpdateFailed.name: {
        **COMMON,
        "duration_ms": "float",
        "error": "str",
        "error_message": "str",
        "committed_layers": "ints",
    },
    FenceWaited.name: {**COMMON, "duration_ms": "float", "lead": "int"},
    PassesTimed.name: {**COMMON, "beside": "str", "times_ms": "times", "num_passes_by_time": "counts"},
    RebalanceEvaluated.name: {
        **COMMON,
        "pays": "bool",
        "reason": "str",
        "received_nbytes": "int",
        "horizon_steps": "int",
        **dict.fromkeys(
            ("mean_balancedness_before", "mean_balancedness_after", "transfer_ms", "saved_ms_per_step"), "float"
        ),
    },
    RebalanceFinished.name: {
        **COMMON,
        "number": "int",
        "moved": "bool",
        **dict.fromkeys(("duration_ms", "balancedness_before", "balancedness_after"), "float"),
    },
    LogDropped.name: {**COMMON, "num_events": "int", "error": "str"},
}
"""Event → key → kind of its values. Run ids are numbers by the time they get here."""

LINKS = {
    "sent": ("sent_to_ranks", "sent_nbytes_by_rank"),
    "received": ("received_from_ranks", "received_nbytes_by_rank"),
}
"""Table of links, one row a peer → keys of a transfer: its peers, and the bytes to or from each of them."""

LINK_COLUMNS = ("run_id", "generation", "rank", "layer", "peer", "nbytes", "transfer_ms", "transfer_nbytes")
"""The last two are those of the whole transfer, with all its peers."""

_TYPES: dict[str, frozenset[type]] = {
    "int": frozenset({int}),
    "float": frozenset({int, float}),
    "str": frozenset({str}),
    "bool": frozenset({bool}),
    **dict.fromkeys(("ints", "times", "counts"), frozenset({list})),
}
_DTYPES = {"int": np.int64, "float": np.float64, "str": object, "bool": np.bool_}
_ELEMENTS = {"ints": "int", "counts": "int", "times": "float"}
"""Kind of a list → kind of what is in it. Columns have the lengths of ``ints``, and the others as tuples."""


class TableBuilder:
    """Gathers the rows of one kind of event.

    :param columns: key → kind of its values
    :param links: name of a table of links → its two keys, as in :data:`LINKS`
    """

    def __init__(self, columns: Mapping[str, str], links: Mapping[str, tuple[str, str]]) -> None:
        self.num_malformed = 0
        """Rows that were left out because a value is not of its key's kind."""
        self.num_repeated = 0
        """Rows that were left out because an equal one is there."""
        self._columns = dict(columns)
        self._links = dict(links)
        self._rows: list[tuple[Any, ...]] = []
        self._chunks: list[Table] = []
        self._link_chunks: dict[str, list[Table]] = {name: [] for name in links}
        self._get: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*self._columns)

    def add(self, event: Mapping[str, Any]) -> None:
        """Add a row.

        :raises KeyError: if a key is missing
        """
        self._rows.append(self._get(event))
        if len(self._rows) == _CHUNK:
            self._flush()

    def tables(self) -> tuple[Table, dict[str, Table]]:
        """Return all rows, each once, and the tables of links, which have a row for each peer of each of them.

        Of ``ints``, only the lengths are columns. Columns of links are :data:`LINK_COLUMNS`.
        """
        self._flush()
        table = _joined(self._chunks, _columns_of([], self._columns))
        kept = _first_of_each(table)
        self.num_repeated = int((~kept).sum())
        links = {}
        for name, (peers, _) in self._links.items():
            links[name] = _joined(self._link_chunks[name], dict.fromkeys(LINK_COLUMNS, np.zeros(0, dtype=np.int64)))
            links[name] = _rows_of(links[name], np.repeat(kept, table[f"num_{peers}"]))
        return _rows_of(table, kept), links

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not self._fit(rows):
            good = [row for row in rows if self._fit([row])]
            self.num_malformed += len(rows) - len(good)
            rows = good
        if not rows:
            return
        chunk = _columns_of(rows, self._columns)
        self._chunks.append(chunk)
        for name, (peers, nbytes) in self._links.items():
            self._link_chunks[name].append(_links_of(rows, list(self._columns), chunk, peers, nbytes))

    def _fit(self, rows: list[tuple[Any, ...]]) -> bool:
        columns = dict(zip(self._columns, zip(*rows, strict=True), strict=False))
        return all(_fits(values, self._columns[name], name) for name, values in columns.items()) and all(
            list(map(len, columns[peers])) == list(map(len, columns[nbytes]))
            for peers, nbytes in self._links.values()
            if columns
        )


def _joined(chunks: Sequence[Table], empty: Table) -> Table:
    return {name: np.concatenate([chunk[name] for chunk in chunks] or [empty[name]]) for name in empty}


def _rows_of(table: Table, kept: NDArray[np.bool_]) -> Table:
    return table if kept.all() else {name: column[kept] for name, column in table.items()}


def _first_of_each(table: Table) -> NDArray[np.bool_]:
    """Return which rows have no equal one before them: what a rank logs twice differs in its time at least."""
    _, which, counts = np.unique(table["monotonic_s"], return_inverse=True, return_counts=True)
    kept: NDArray[np.bool_] = counts[which] == 1
    suspects = np.flatnonzero(~kept).tolist()
    first: dict[tuple[Any, ...], int] = {}
    for number, row in zip(
        suspects, zip(*(column[suspects].tolist() for column in table.values()), strict=True), strict=True
    ):
        first.setdefault(row, number)
    kept[list(first.values())] = True
    return kept


def _fits(values: Sequence[Any], kind: str, name: str = "") -> bool:
    """Return whether all values are of a kind, and within the bounds of their key."""
    if not set(map(type, values)) <= _TYPES[kind]:
        return False
    if kind == "int":
        least, limit = _BOUNDS.get(name, _ANY)
        return bool(min(values) >= least and max(values) < limit)
    if kind == "float":
        try:
            return bool(np.isfinite(np.array(values, dtype=np.float64)).all())
        except OverflowError:  # an integer too large for a float
            return False
    if kind in _ELEMENTS:
        elements = list(chain.from_iterable(values))
        return not elements or _fits(elements, _ELEMENTS[kind], name)
    return True


def _columns_of(rows: Iterable[tuple[Any, ...]], columns: Mapping[str, str]) -> Table:
    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    table: Table = {}
    for (name, kind), column in zip(columns.items(), values, strict=True):
        if kind == "ints":
            table[f"num_{name}"] = np.fromiter(map(len, column), dtype=np.int64)
        elif kind in _ELEMENTS:
            table[name] = np.fromiter(map(tuple, column), dtype=object)
        else:
            table[name] = np.array(column, dtype=_DTYPES[kind])
    return table


def _links_of(rows: list[tuple[Any, ...]], names: list[str], chunk: Table, peers: str, nbytes: str) -> Table:
    index, other = names.index(peers), names.index(nbytes)
    lengths = chunk[f"num_{peers}"]
    table = {name: np.repeat(chunk[name], lengths) for name in ("run_id", "generation", "rank", "layer")}
    received = chunk["received_nbytes_within_node"] + chunk["received_nbytes_across_nodes"]
    table["transfer_nbytes"] = np.repeat(received, lengths)
    table["transfer_ms"] = np.repeat(chunk["duration_ms"], lengths)
    for column, position in (("peer", index), ("nbytes", other)):
        table[column] = np.fromiter(chain.from_iterable(row[position] for row in rows), dtype=np.int64)
    return table
