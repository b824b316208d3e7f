"""Events as lines of JSON in a file, written by a separate thread: logging never waits for the disk."""

import atexit
import os
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self

import structlog
from structlog.typing import EventDict, Processor

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import LEVELS, STANDARD, Logger
from async_eplb.events.line_file import Entry, EventRecord, LineFile, Writer

MAX_WAITING = 100_000
"""Limit of events that wait to be written; one has about 500 bytes."""

_EXIT_S = 1.0


def configure_json_logging(path: str | os.PathLike[str], *, level: str = "info") -> "JsonLog":
    """Make structlog log to a file of JSON lines, for applications that have no logging of their own.

    Nothing else in this package configures anything. Lines are appended; folders are made, and a file that was renamed
    or removed is opened anew. When the disk is full or too slow, events are dropped and counted:
    :attr:`JsonLog.num_dropped`, and an ``eplb.log.dropped`` line as soon as writing works again. Every line is written
    by the end of the process, if the disk answers within a second. Closing the log, or leaving it as a context manager,
    writes them before and restores the former configuration of structlog.

    In a child made by ``os.fork`` there is no thread: what it logs is written at once, to the same file.

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
        if level not in LEVELS:
            raise InvalidOptions(f"level is {level!r}; it must be one of {', '.join(LEVELS)}", option="level")
        self._level = LEVELS[level]
        self._entry = Entry(max_waiting)
        try:
            self._file = LineFile(path, self._entry, write)
        except (OSError, TypeError, ValueError) as error:
            raise InvalidOptions(f"{path!r} cannot be written: {error}", option="path") from error
        self._writer = Writer(self._entry, self._file)
        self._writer.start()
        self._pid = os.getpid()
        self._previous: dict[str, Any] | None = None
        self._was_configured = False
        atexit.register(self.close, _EXIT_S)

    @property
    def num_dropped(self) -> int:
        """Events dropped so far."""
        return self.num_dropped_by_reason.total()

    @property
    def num_dropped_by_reason(self) -> Counter[str]:
        """Events dropped so far, by reason; it is empty for those that found ``max_waiting`` others waiting."""
        return self._entry.num_lost

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

    def close(self, timeout_s: float | None = None) -> None:
        """Write all waiting events, close the file, and restore the former configuration of structlog.

        If events were dropped, standard logging is warned, with their number and the reasons.

        :param timeout_s: how long to wait for the disk, in seconds; without it, until it answers
        """
        if self._previous is not None:
            structlog.configure(**self._previous) if self._was_configured else structlog.reset_defaults()
            self._previous = None
        if not self._entry.close_once():
            return
        atexit.unregister(self.close)
        if self._is_forked() or self._writer.finish(timeout_s):
            self._file.finish()
        else:
            self._entry.num_lost["the disk did not answer"] += self._entry.waiting.qsize()
        if self.num_dropped:
            reasons = dict(self.num_dropped_by_reason)
            STANDARD.warning("%s: %d events were dropped: %s", self._file.baseFilename, self.num_dropped, reasons)

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
            self._hand_over,
        ]

    def _hand_over(self, _logger: object, _method: str, event: EventDict) -> NoReturn:
        """Queue the event for the writer; the last processor of a chain."""
        record = EventRecord(event)
        if self._is_forked() and not self._entry.closed:
            with self._entry.locked():
                self._file.handle(record)
        else:
            self._entry.handle(record)
        raise structlog.DropEvent

    def _is_forked(self) -> bool:
        return os.getpid() != self._pid
