"""Lines of logs → columns of events; lines that are in no column are counted with the reason."""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from async_eplb.errors import UnreadableLog
from async_eplb.events.schema import EVENTS, SCHEMA_VERSION, LayerTransferred
from async_eplb.report.columns import COLUMNS, LINKS, Table, TableBuilder
from async_eplb.report.files import find_logs, read_lines

loads: Callable[[bytes], Any] = json.loads
with suppress(ImportError):  # the extra "report" only makes this faster
    import orjson

    loads = orjson.loads

_KNOWN = frozenset(event.name for event in EVENTS)
_MARK = b'"eplb.'
_CUT_OFF = "a line that is cut off"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A number of lines of one source that are in no column for the same reason."""

    source: str
    reason: str
    num_lines: int

    def __str__(self) -> str:
        """Return it as one line of text."""
        return f"{self.source}: {self.num_lines} line{'s' if self.num_lines > 1 else ''} left out: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class EventLog:
    """Events of any number of ranks and runs, in columns.

    :param tables: event name → its table; of every event that a report needs, with no rows if there are none
    :param links: ``"sent"`` and ``"received"`` → one row for each peer of each transfer
    :param run_ids: ``run_id`` in the tables is an index into these
    :param left_out: lines that are in no table
    """

    tables: Mapping[str, Table]
    links: Mapping[str, Table]
    run_ids: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def read_events(*logs: str) -> EventLog:
    """Read logs of any ranks and runs: files, folders, globs, gzip, ``-`` for standard input.

    Lines that are no events of this package, cannot be read, or were read already (of the same log under another name,
    or packed), are left out and counted.

    :raises UnreadableLog: if a log is not there, cannot be opened, or none holds an event
    """
    reader = EventReader()
    with _no_garbage_collection():
        for name in find_logs(logs):
            reader.read(read_lines(name), name)
    log = reader.log()
    if not any(len(table["rank"]) for table in log.tables.values()):
        reasons = "; ".join(map(str, log.left_out)) or "they are empty"
        raise UnreadableLog(f"no event of async_eplb in {', '.join(logs)} ({reasons})", path=logs[0] if logs else "")
    return log


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn the collector off: it would traverse all rows again and again, though none is part of a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class EventReader:
    """Parses lines, any number of times, into one log."""

    def __init__(self) -> None:
        self._runs: dict[str, int] = {}
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._builders = {
            name: TableBuilder(columns, LINKS if name == LayerTransferred.name else {})
            for name, columns in COLUMNS.items()
        }

    def read(self, lines: Iterable[bytes], source: str) -> None:
        """Add the events of lines.

        :param source: names the lines that are left out
        """
        adders: dict[str, Callable[[Mapping[str, Any]], None]] = {n: b.add for n, b in self._builders.items()}
        left_out, runs = self._left_out, self._runs
        for line in lines:
            if _MARK not in line:
                if line.strip():
                    is_cut = line.startswith(b"{") and not line.endswith((b"\n", b"}"))
                    left_out[source, _CUT_OFF if is_cut else "of other programs"] += 1
                continue
            try:
                event = _parsed(line)
                add = adders.get(event["event"])
                version = event["schema_version"]
                if add is None or version != SCHEMA_VERSION:
                    self._refuse(source, event)
                    continue
                run_id = event["run_id"]
                event["run_id"] = runs[run_id] if run_id in runs else runs.setdefault(str(run_id), len(runs))
                add(event)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                left_out[source, _reason(line, error)] += 1

    def log(self) -> EventLog:
        """Return the log of all lines so far."""
        tables = {name: builder.tables() for name, builder in self._builders.items()}
        malformed = tuple(
            LeftOut(name, "a value that its key cannot have", builder.num_malformed)
            for name, builder in self._builders.items()
            if builder.num_malformed
        )
        left_out = tuple(LeftOut(*key, number) for key, number in sorted(self._left_out.items()))
        num_repeated = sum(builder.num_repeated for builder in self._builders.values())
        repeated = (LeftOut("all logs", "of events that were read already", num_repeated),) if num_repeated else ()
        return EventLog(
            tables={name: table for name, (table, _) in tables.items()},
            links=tables[LayerTransferred.name][1],
            run_ids=tuple(self._runs),
            left_out=(*left_out, *malformed, *repeated),
        )

    def _refuse(self, source: str, event: Mapping[str, Any]) -> None:
        name, version = event["event"], event["schema_version"]
        if name in _KNOWN and version == SCHEMA_VERSION:
            return  # an event that no report needs
        if name in _KNOWN or str(name).startswith("eplb."):
            reason = f"of schema version {version}; this is {SCHEMA_VERSION}"
            self._left_out[source, reason if version != SCHEMA_VERSION else f"unknown event {name}"] += 1
        else:
            self._left_out[source, "of other programs"] += 1


def _parsed(line: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Return the value of a line of JSON; NaN, and what else orjson refuses, is read as the standard library does."""
    try:
        return loads(line)
    except ValueError:
        return json.loads(line)


def _reason(line: bytes, error: Exception) -> str:
    if isinstance(error, KeyError):
        return "of other programs" if error.args[0] == "event" else f"without {error.args[0]}"
    if isinstance(error, ValueError | RecursionError):
        return "no JSON" if line.endswith(b"\n") else _CUT_OFF
    return "not an event"
