"""A logger with a level for each kind of event, and observers, such as metrics, that are called with every event."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import FAULTS, LEVELS, LeveledLogger, Logger, require_logger
from async_eplb.events.schema import EVENTS

Observer = Callable[[Mapping[str, Any]], None]
"""Called with every event as it is logged, including ``event`` and ``run_id``. Must be fast, and safe on any thread."""

_CHOICES = ("off", *LEVELS)


class EventLogger(LeveledLogger):
    """Forwards events to a logger; pass it as ``logger`` wherever this package takes one.

    A listener that raises keeps no event from the others; then what the first one raised goes on.

    :param logger: target of the events; without it, the application's logger
    :param levels: event name → level to log it at, ``"off"`` for not at all; the level of the schema if not named
    :param observers: called with every event, also with those that are off
    :raises InvalidOptions: for an unknown event or level, or what is no logger
    """

    def __init__(
        self,
        logger: Logger | None = None,
        *,
        levels: Mapping[str, str] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self._logger = require_logger(logger)
        self._levels = dict(levels or {})
        self._observers = tuple(observers)
        self._bound: dict[str, Any] = {}
        known = {event.name for event in EVENTS}
        for name, level in self._levels.items():
            if name not in known:
                raise InvalidOptions(f"there is no event {name!r}; EVENTS.md lists all", option="levels")
            if level not in _CHOICES:
                raise InvalidOptions(
                    f"the level of {name} is {level!r}; it must be one of {', '.join(_CHOICES)}", option="levels"
                )

    def bind(self, **values: Any) -> "EventLogger":  # noqa: ANN401
        """Return a logger that adds ``values`` to each event."""
        bound = EventLogger(self._logger.bind(**values), levels=self._levels, observers=self._observers)
        bound._bound = {**self._bound, **values}
        return bound

    def _log(self, level: str, event: str, values: dict[str, Any]) -> None:
        calls = [partial(observe, {"event": event, **self._bound, **values}) for observe in self._observers]
        level = self._levels.get(event, level)
        if level != "off":
            calls.append(partial(getattr(self._logger, level), event, **values))
        faults = []
        for call in calls:
            try:
                call()
            except FAULTS as fault:
                faults.append(fault)
        if faults:
            raise faults[0]
