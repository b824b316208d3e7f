"""Events as lines of JSON in a file, written by a separate thread: logging never waits for the disk."""

import json
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from threading import Lock
from types import TracebackType
from typing import Any, NoReturn, Self

import structlog
from structlog.typing import EventDict, Processor

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import Logger, stamped
from async_eplb.events.schema import LogDropped

MAX_WAITING = 100_000
"""Limit of events that wait to be written; one has about 500 bytes."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30}


def configure_json_logging(path: str | os.PathLike[str], *, level: str = "info") -> "JsonLog":
    """Make structlog log to a file of JSON lines, for applications that have no logging of their own.

    Nothing else in this package configures anything. Lines are appended. When the disk is full or too slow, events are
    dropped and counted: :attr:`JsonLog.num_dropped`, and an ``eplb.log.dropped`` line as soon as writing works again.
    Every line is written by the end of the process. Closing the log, or leaving it as a context manager, writes them
    before and restores the former configuration of structlog.

    :param level: ``"debug"``, ``"info"`` or ``"warning"``
    :raises InvalidOptions: if the file cannot be opened, or the level is none of these
    """
    log = JsonLog(path, level=level)
    log.configure_structlog()
    return log


class JsonLog:
    """A file of JSON lines, and the thread that writes it.

    :param level: lowest level that is written
    :param max_waiting: limit of events that wait for the disk; further ones are dropped and counted
    :param write: as ``os.write``
    :raises InvalidOptions: if the file cannot be opened, or the level is unknown
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        level: str = "info",
        max_waiting: int = MAX_WAITING,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        if level not in _LEVELS:
            raise InvalidOptions(f"level is {level!r}; it must be one of {', '.join(_LEVELS)}", option="level")
        self.num_dropped = 0
        """Events dropped so far."""
        self._level = _LEVELS[level]
        self._max_waiting = max_waiting
        self._waiting: deque[EventDict] = deque()
        self._lock = Lock()
        self._draining = False
        self._dropped: LogDropped | None = None
        self._run_id = ""
        self._previous: dict[str, Any] | None = None
        self._was_configured = False
        self._closed = False
        try:
            self._lines = _LineFile(path, write)
        except OSError as error:
            raise InvalidOptions(f"{path} cannot be written: {error.strerror}", option="path") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="eplb-log")
        self._writer.submit(lambda: None)  # starts the thread now, not while the model serves

    def logger(self) -> Logger:
        """Return a logger that writes to this file only; structlog stays as it is configured."""
        logger: Logger = structlog.wrap_logger(
            None, processors=self._processors(), wrapper_class=structlog.make_filtering_bound_logger(self._level)
        )
        return logger

    def configure_structlog(self) -> None:
        """Configure structlog to log to this file, until the log is closed."""
        self._was_configured, self._previous = structlog.is_configured(), structlog.get_config()
        structlog.configure(
            processors=self._processors(),
            wrapper_class=structlog.make_filtering_bound_logger(self._level),
            logger_factory=lambda *_: None,
            cache_logger_on_first_use=False,
        )

    def close(self) -> None:
        """Write all waiting events, close the file, and restore the former configuration of structlog."""
        if self._previous is not None:
            structlog.configure(**self._previous) if self._was_configured else structlog.reset_defaults()
            self._previous = None
        if not self._closed:
            self._closed = True
            self._writer.submit(self._report_dropped)
            self._writer.shutdown()
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _processors(self) -> list[Processor]:
        return [
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso"),
            self._queue,
        ]

    def _queue(self, _logger: object, _method: str, event: EventDict) -> NoReturn:
        """Queue the event for the writer; the last processor of a chain."""
        with self._lock:
            if len(self._waiting) < self._max_waiting:
                self._waiting.append(event)
            else:
                self._count_dropped([event], "")
            start, self._draining = not self._draining, True
        if start:
            try:
                self._writer.submit(self._drain)
            except RuntimeError:  # closed, or the interpreter is about to end
                with self._lock:
                    self._count_dropped(list(self._waiting), "the log is closed")
                    self._waiting.clear()
                    self._draining = False
        raise structlog.DropEvent

    def _drain(self) -> None:
        """Write until no event waits; runs in the writer's thread."""
        while True:
            with self._lock:
                events, self._waiting = list(self._waiting), deque()
                if not events:
                    self._draining = False
                    return
            self._report_dropped()
            num_written = self._lines.write([_line(event) for event in events])
            with self._lock:
                self._count_dropped(events[num_written:], str(self._lines.error))

    def _report_dropped(self) -> None:
        """Write the number of events that were dropped since writing last succeeded."""
        with self._lock:
            dropped, run_id = self._dropped, self._run_id
        if dropped is None:
            return
        if self._lines.write([_line({"event": dropped.name, "run_id": run_id, **stamped(dropped)})]):
            with self._lock:
                num_since = self._dropped.num_events - dropped.num_events if self._dropped else 0
                self._dropped = replace(self._dropped or dropped, num_events=num_since) if num_since else None

    def _count_dropped(self, events: list[EventDict], error: str) -> None:
        """Add to the number that is written when writing succeeds again. The caller holds the lock."""
        if not events:
            return
        self.num_dropped += len(events)
        if self._dropped is None:
            facts = {name: int(events[0].get(name, 0)) for name in ("generation", "rank", "step")}
            self._dropped = LogDropped(num_events=len(events), error=error, **facts)
            self._run_id = str(events[0].get("run_id", ""))
        else:
            number = self._dropped.num_events + len(events)
            self._dropped = replace(self._dropped, num_events=number, error=error or self._dropped.error)


class _LineFile:
    """Appends whole lines to a file."""

    def __init__(self, path: str | os.PathLike[str], write: Callable[[int, bytes], int]) -> None:
        self.error: OSError | None = None
        """Last error of writing."""
        self._write = write
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._torn = False

    def write(self, lines: list[bytes]) -> int:
        """Write lines and return the number that is wholly in the file: fewer than given if writing failed."""
        data = (b"\n" if self._torn else b"") + b"".join(lines)
        start = len(data) - sum(map(len, lines))
        done = 0
        try:
            while done < len(data):
                done += self._write(self._file, data[done:])
        except OSError as error:
            self.error = error
        ends = list(accumulate(map(len, lines), initial=start))
        num_written = max(bisect_right(ends, done) - 1, 0)
        self._torn = done not in ends if done else self._torn
        return num_written

    def close(self) -> None:
        os.close(self._file)


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, default=repr).encode() + b"\n"
