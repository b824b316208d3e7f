"""A logger with a level for each kind of event, and observers, such as metrics, that are called with every event."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import Logger, default_logger
from async_eplb.events.schema import EVENTS

Observer = Callable[[Mapping[str, Any]], None]
"""Called with every event as it is logged, including ``event`` and ``run_id``. Must be fast, and safe on any thread."""

LEVELS = ("off", "debug", "info", "warning")


class EventLogger:
    """Forwards events to a structlog logger; pass it as ``logger`` wherever this package takes one.

    :param logger: target of the events; without it, the application's logger
    :param levels: event name → level to log it at, ``"off"`` for not at all; the level of the schema if not named
    :param observers: called with every event, also with those that are off
    :raises InvalidOptions: for an unknown event or level
    """

    def __init__(
        self,
        logger: Logger | None = None,
        *,
        levels: Mapping[str, str] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self._logger = logger or default_logger()
        self._levels = dict(levels or {})
        self._observers = tuple(observers)
        self._bound: dict[str, Any] = {}
        known = {event.name for event in EVENTS}
        for name, level in self._levels.items():
            if name not in known:
                raise InvalidOptions(f"there is no event {name!r}; EVENTS.md lists all", option="levels")
            if level not in LEVELS:
                raise InvalidOptions(
                    f"the level of {name} is {level!r}; it must be one of {', '.join(LEVELS)}", option="levels"
                )

    def bind(self, **values: Any) -> "EventLogger":  # noqa: ANN401
        """Return a logger that adds ``values`` to each event."""
        bound = EventLogger(self._logger.bind(**values), levels=self._levels, observers=self._observers)
        bound._bound = {**self._bound, **values}
        return bound

    def debug(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level debug."""
        self._log("debug", event, values)

    def info(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level info."""
        self._log("info", event, values)

    def warning(self, event: str, **values: Any) -> None:  # noqa: ANN401
        """Log at level warning."""
        self._log("warning", event, values)

    def _log(self, own_level: str, event: str, values: dict[str, Any]) -> None:
        for observe in self._observers:
            observe({"event": event, **self._bound, **values})
        level = self._levels.get(event, own_level)
        if level != "off":
            getattr(self._logger, level)(event, **values)
