"""What a running server's updates are at, event by event: small, however long it runs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_eplb.events.schema import (
    SCHEMA_VERSION,
    FenceWaited,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
    LogDropped,
    RebalanceFinished,
    UpdateFailed,
    UpdateFinished,
    UpdateStarted,
)
from async_eplb.report.columns import fits

_MAX_READ = 1 << 24

MAX_UPDATES = 8
"""Updates that are remembered: the last ones."""

_STAGES = {LayerPlanned.name: "plan", LayerTransferred.name: "transfer", LayerCommitted.name: "commit"}


@dataclass(slots=True)
class LiveUpdate:
    """One update so far.

    :param done: (rank, stage) → layers
    :param stalls_ms: (rank, step) → host time that the step lost
    :param ended: rank → how it ended there
    """

    run_id: str
    generation: int
    num_ranks: int = 0
    num_layers: int = 0
    mode: str = "unknown"
    done: Counter[tuple[int, str]] = field(default_factory=Counter)
    received_nbytes: int = 0
    stalls_ms: Counter[tuple[int, int]] = field(default_factory=Counter)
    num_fence_waits: int = 0
    ended: dict[int, str] = field(default_factory=dict)
    duration_ms: float = 0.0
    error: str = ""

    @property
    def outcome(self) -> str:
        """How it stands."""
        if self.error:
            return "failed"
        return "finished" if self.ended and len(self.ended) >= self.num_ranks else "running"


class LiveState:
    """Takes in lines of any ranks, in any order."""

    def __init__(self) -> None:
        self.updates: dict[tuple[str, int], LiveUpdate] = {}
        """By run and generation, oldest first."""
        self.balancedness: tuple[float, float] | None = None
        """Before and after the last rebalance."""
        self.num_events = 0
        self.num_left_out = 0
        self.num_dropped = 0
        """Events that ranks could not write."""

    def take(self, lines: Iterable[bytes]) -> None:
        """Take in whole lines; what is no event of this schema is counted as left out."""
        for line in lines:
            try:
                event = json.loads(line)
                if event["event"].startswith("eplb.") and event["schema_version"] == SCHEMA_VERSION:
                    self._take(event)
                    self.num_events += 1
                    continue
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                pass
            self.num_left_out += 1

    def _take(self, event: Mapping[str, Any]) -> None:
        name = event["event"]
        if name == RebalanceFinished.name:
            self.balancedness = (_real(event, "balancedness_before"), _real(event, "balancedness_after"))
        elif name == LogDropped.name:
            self.num_dropped += _whole(event, "num_events")
        elif name in _STAGES or name in (UpdateStarted.name, UpdateFinished.name, UpdateFailed.name, FenceWaited.name):
            self._take_of_update(self._update(str(event["run_id"]), _whole(event, "generation")), event)

    def _update(self, run_id: str, generation: int) -> LiveUpdate:
        update = self.updates.setdefault((run_id, generation), LiveUpdate(run_id, generation))
        while len(self.updates) > MAX_UPDATES:
            del self.updates[next(iter(self.updates))]
        return update

    def _take_of_update(self, update: LiveUpdate, event: Mapping[str, Any]) -> None:
        name, rank = event["event"], _whole(event, "rank")
        if name == UpdateStarted.name:
            update.num_ranks, update.num_layers = _whole(event, "num_ranks"), _whole(event, "num_layers")
            update.mode = str(event["mode"])
        elif name in _STAGES:
            update.done[rank, _STAGES[name]] += 1
            if name == LayerTransferred.name:
                update.received_nbytes += _whole(event, "received_nbytes")
            if name == LayerCommitted.name and event["step"]:
                update.stalls_ms[rank, _whole(event, "step")] += _real(event, "copy_ms")  # type: ignore[assignment]
        elif name == FenceWaited.name:
            update.num_fence_waits += 1
            update.stalls_ms[rank, _whole(event, "step")] += _real(event, "duration_ms")  # type: ignore[assignment]
        else:
            update.ended[rank] = name
            update.duration_ms = max(update.duration_ms, _real(event, "duration_ms"))
            if name == UpdateFailed.name:
                update.error = str(event["error"])


def _whole(event: Mapping[str, Any], key: str) -> int:
    """Return a number that is one, in the bounds of its name: a damaged one must not size what is shown."""
    if not fits([event[key]], "int", key):
        raise ValueError(f"{key} is {event[key]!r}")
    return int(event[key])


def _real(event: Mapping[str, Any], key: str) -> float:
    if not fits([event[key]], "float"):
        raise ValueError(f"{key} is {event[key]!r}")
    return float(event[key])


class Tail:
    """Reads what is appended to files, in whole lines; new files are found, and replaced ones are read anew."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[int, int, bytes]] = {}
        """Name → the file's number, how far it was read, and the line that is not whole yet."""

    def new_lines(self, names: Iterable[str]) -> list[bytes]:
        """Return the lines that have been added since the last call."""
        return [line for name in names for line in self._new_lines(name)]

    def _new_lines(self, name: str) -> list[bytes]:
        number, offset, rest = self._read.get(name, (-1, 0, b""))
        try:
            with Path(name).open("rb") as file:
                state = Path(name).stat()
                if state.st_ino != number or state.st_size < offset:
                    offset, rest = 0, b""
                file.seek(offset)
                data = file.read(_MAX_READ)
        except FileNotFoundError:
            return []
        *lines, left = (rest + data).split(b"\n")
        self._read[name] = (state.st_ino, offset + len(data), left)
        return [line for line in lines if line.strip()]
