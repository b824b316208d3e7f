"""Emission of events through a structlog logger of the caller's choice. Importing this configures nothing."""

import logging
import time
from operator import attrgetter
from typing import Any, Protocol

import structlog

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


_FIELDS = {event: (field_names(event), attrgetter(*field_names(event))) for event in EVENTS}


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


_STANDARD_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


class _StandardLogger(structlog.stdlib.BoundLogger):
    """Standard logging that skips disabled levels before any processor runs."""

    def _proxy_to_logger(self, method_name: str, event: str | None = None, *args: Any, **values: Any) -> Any:  # noqa: ANN401
        if self._logger.isEnabledFor(_STANDARD_LEVELS[method_name]):
            return super()._proxy_to_logger(method_name, event, *args, **values)
        return None


def default_logger() -> Logger:
    """Return the logger for callers that pass none: the application's structlog, else its standard logging.

    An application that configured neither sees only the names of warnings and errors.
    """
    if structlog.is_configured():
        logger: Logger = structlog.get_logger("async_eplb")
        return logger
    wrapped: Logger = structlog.wrap_logger(
        logging.getLogger("async_eplb"),
        processors=[structlog.stdlib.render_to_log_kwargs],
        wrapper_class=_StandardLogger,
    )
    return wrapped
