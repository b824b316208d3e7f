"""Emission of events through a logger of the caller's choice. Importing this configures nothing.

Every event of this package goes through a :class:`GuardedLogger`: whatever loggers and observers raise ends nothing
(rule 26).
"""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from threading import RLock
from typing import Any, Protocol

import structlog

from async_eplb.errors import InvalidOptions
from async_eplb.events.plain import shown
from async_eplb.events.schema import EVENTS, SCHEMA_VERSION, Event, field_names


class Logger(Protocol):
    """A logger that accepts events, such as structlog's bound loggers."""

    def bind(self, **values: Any) -> "Logger":  # noqa: ANN401
        """Return a logger that adds ``values`` to each event."""
        ...

    def debug(self, event: str, **values: Any) -> Any:  # noqa: ANN401
        """Log at level debug."""
        ...

    def info(self, event: str, **values: Any) -> Any:  # noqa: ANN401
        """Log at level info."""
        ...

    def warning(self, event: str, **values: Any) -> Any:  # noqa: ANN401
        """Log at level warning."""
        ...


LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
"""Levels that events have → their numbers in standard logging."""

STANDARD = logging.getLogger("async_eplb")
"""The package's logger in standard logging: quiet unless the application gives it, or the root logger, a handler."""
STANDARD.addHandler(logging.NullHandler())

FAULTS = (Exception, structlog.DropEvent)
"""What loggers and observers raise that did not take an event; anything else, such as a cancellation, is no fault."""

_FIELDS = {event: (field_names(event), attrgetter(*field_names(event))) for event in EVENTS}
_OF_RECORDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""Attributes that records of standard logging have themselves."""
_NOT_IN_MESSAGES = frozenset({"schema_version", "monotonic_s", "wall_s"})


def stamped(event: Event) -> dict[str, Any]:
    """Return an event's fields as flat keys, with the schema version and the current time of both clocks."""
    names, get = _FIELDS[type(event)]
    values: dict[str, Any] = dict(zip(names, get(event), strict=True))
    values["schema_version"] = SCHEMA_VERSION
    values["monotonic_s"] = time.monotonic()
    values["wall_s"] = time.time()
    return values


def emit(logger: Logger, event: Event) -> None:
    """Log an event under its name, at its level.

    :param logger: has ``run_id`` bound
    """
    getattr(logger, event.level)(event.name, **stamped(event))


class LeveledLogger:
    """Base of loggers that handle all levels alike."""

    def debug(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level debug."""
        self._log("debug", event, values)

    def info(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level info."""
        self._log("info", event, values)

    def warning(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level warning."""
        self._log("warning", event, values)

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        raise NotImplementedError


class GuardedLogger(LeveledLogger):
    """Forwards events to a logger, and goes on whatever it raises.

    Lost events are counted; the first is told to standard logging, with what was raised. What is no fault,
    such as a cancellation, passes.
    """

    def __init__(self, logger: Logger) -> None:
        self.num_lost = 0
        """Events that the logger, or one of its observers, did not take."""
        self._logger = logger
        self._lock = RLock()

    def bind(self, **values: Any) -> "GuardedLogger":  # noqa: ANN401
        """Return a logger that adds ``values`` to each event, and has a count of its own."""
        return GuardedLogger(self._logger.bind(**values))

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        try:
            getattr(self._logger, level)(event, **values)
        except FAULTS:
            with self._lock:
                self.num_lost += 1
                first = self.num_lost == 1
            if first:
                with suppress(Exception):
                    STANDARD.warning("a logger or observer raised at %s; later ones are counted", event, exc_info=True)


class StandardLogger(LeveledLogger):
    """Logs events to a logger of standard logging: fields are in the message, and are attributes of the record.

    :param logger: such as ``logging.getLogger("vllm.eplb")``
    :param bound: fields of each event
    """

    def __init__(self, logger: logging.Logger, bound: Mapping[str, Any] | None = None) -> None:
        self._logger = logger
        self._bound = dict(bound or {})

    def bind(self, **values: Any) -> "StandardLogger":  # noqa: ANN401
        """Return a logger that adds ``values`` to each event."""
        return StandardLogger(self._logger, {**self._bound, **values})

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(LEVELS[level]):
            return
        fields = {**self._bound, **values}
        told = " ".join(f"{key}={shown(value)}" for key, value in fields.items() if key not in _NOT_IN_MESSAGES)
        extra = {f"{key}_" if key in _OF_RECORDS else key: value for key, value in fields.items()}
        self._logger.log(LEVELS[level], "%s %s", event, told, extra={**extra, "event": event})


class _ApplicationsLogger(LeveledLogger):
    """Logs to structlog if the application has configured it by the time of an event, else to standard logging."""

    def __init__(self, bound: Mapping[str, Any]) -> None:
        self._bound = bound
        self._structlog: Logger = structlog.get_logger(STANDARD.name, **bound)
        self._standard = StandardLogger(STANDARD, bound)

    def bind(self, **values: Any) -> "_ApplicationsLogger":  # noqa: ANN401
        return _ApplicationsLogger({**self._bound, **values})

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        getattr(self._structlog if structlog.is_configured() else self._standard, level)(event, **values)


def default_logger() -> Logger:
    """Return the logger for callers that pass none: the application's structlog, or its standard logging."""
    return _ApplicationsLogger({})


def require_logger(logger: Logger | None) -> Logger:
    """Return the logger, or the default one for None.

    :raises InvalidOptions: if it is none that takes events
    """
    chosen = default_logger() if logger is None else logger
    if not all(callable(getattr(chosen, name, None)) for name in ("bind", *LEVELS)):
        raise InvalidOptions(
            f"logger is {logger!r}, which lacks bind(), debug(), info() or warning(); pass one of structlog, or "
            "StandardLogger(logger) for one of standard logging",
            option="logger",
        )
    return chosen


def guarded(logger: Logger | None, *, run_id: str, updater: str | None = None) -> GuardedLogger:
    """Return a logger, the default one for None, for the events of one updater, that never raises.

    :param updater: name of the updater, if it has one
    :raises InvalidOptions: as :func:`require_logger`
    """
    names = {"updater": updater} if updater else {}
    return GuardedLogger(require_logger(logger).bind(run_id=run_id, **names))
