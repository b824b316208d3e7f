"""Events → OpenTelemetry spans, through the API package (extra ``tracing``): updates, with stages of layers inside."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from async_eplb.errors import MissingExtra
from async_eplb.events.schema import LayerPlanned, UpdateFailed, UpdateFinished, UpdateStarted
from async_eplb.events.stages import COMMIT, FENCE, PLAN, TRANSFER

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

_STAGES = {stage.event.name: f"eplb.{stage.name}" for stage in (PLAN, TRANSFER, COMMIT, FENCE)}
"""Event that is logged at a stage's end → name of the stage's span."""
_ENDS = (UpdateFinished.name, UpdateFailed.name)
_NOT_ATTRIBUTES = frozenset({"event", "schema_version", "monotonic_s", "wall_s"})


class Spans:
    """Turns events into spans; an observer for :class:`async_eplb.events.event_logger.EventLogger`.

    Times are those of the wall clock. The span of a layer that was planned before its update's start was logged is made
    after it. Without a tracer provider of the application, the API package discards all spans.

    :param provider: provider of the tracer; without it, the application's
    :raises MissingExtra: without opentelemetry-api
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        try:
            from opentelemetry import trace  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtra(
                "spans need opentelemetry-api; pip install 'async-eplb[tracing]'", extra="tracing"
            ) from error
        self._api = trace
        self._tracer = trace.get_tracer("async_eplb", tracer_provider=provider)
        self._updates: dict[tuple[str, int, int], Span] = {}
        self._early: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Start or end the span of an event."""
        name = event["event"]
        key = (str(event.get("run_id")), event["generation"], event["rank"])
        if name == UpdateStarted.name:
            self._start(key, event)
        elif name in _STAGES:
            if key in self._updates:
                self._stage(key, event)
            elif name == LayerPlanned.name:
                self._early.setdefault(key, []).append(event)
        elif name in _ENDS:
            self._end(key, event)

    def _start(self, key: tuple[str, int, int], event: Mapping[str, Any]) -> None:
        early = self._early.pop(key, [])
        start_ns = min([_ns(event["wall_s"]), *(_start_ns(each) for each in early)])
        self._updates[key] = self._tracer.start_span(
            "eplb.update", start_time=start_ns, attributes=dict(_attributes(event))
        )
        for each in early:
            self._stage(key, each)

    def _stage(self, key: tuple[str, int, int], event: Mapping[str, Any]) -> None:
        span = self._tracer.start_span(
            _STAGES[event["event"]],
            context=self._api.set_span_in_context(self._updates[key]),
            start_time=_start_ns(event),
            attributes=dict(_attributes(event)),
        )
        span.end(_ns(event["wall_s"]))

    def _end(self, key: tuple[str, int, int], event: Mapping[str, Any]) -> None:
        self._early.pop(key, None)
        span = self._updates.pop(key, None)
        if span is None:
            return  # it was refused before it began: no layer has moved
        span.set_attributes(dict(_attributes(event)))
        if event["event"] == UpdateFailed.name:
            description = f"{event['error']}: {event['error_message']}"
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, description))
        span.end(_ns(event["wall_s"]))


def _attributes(event: Mapping[str, Any]) -> Iterator[tuple[str, str | bool | int | float]]:
    """Yield the attributes of a span: all keys of the event whose values are no lists."""
    for name, value in event.items():
        if name not in _NOT_ATTRIBUTES and isinstance(value, str | bool | int | float):
            yield f"eplb.{name}", value


def _ns(wall_s: float) -> int:
    return int(wall_s * 1e9)


def _start_ns(event: Mapping[str, Any]) -> int:
    return _ns(event["wall_s"] - event["duration_ms"] / 1e3)
