"""The reference of all events, generated from their classes as Markdown: the contents of EVENTS.md."""

import inspect
from collections.abc import Iterator
from typing import get_args, get_type_hints

from async_eplb.events.schema import EVENTS, SCHEMA_VERSION, STAMPS, Event, field_names

_INTRODUCTION = f"""\
# Events

What `async_eplb` logs, schema version {SCHEMA_VERSION}; `python -m async_eplb events` prints this page. Keys are flat,
and numbers carry their unit in the name. New events and keys leave the version as it is; it grows when a key changes
its meaning or goes away.

Events of an updater with a name have it as `updater`, and what an application binds to its logger comes along. Every
line of a JSON log is valid JSON in ASCII, whatever was bound: NaN and infinities are null, integers beyond 64 bits are
text, and so is what JSON has no form for, as Python shows it.
"""


def event_reference() -> str:
    """Return the reference: a table of the keys of every event, then one table an event."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    yield "## Keys of every event\n"
    yield "| key | type | meaning |"
    yield "| --- | --- | --- |"
    types = {"schema_version": "int", "monotonic_s": "float", "wall_s": "float"}
    for key, meaning in STAMPS.items():
        yield f"| `{key}` | {types.get(key, 'str')} | {meaning} |"
    yield from _rows(Event, field_names(Event))
    common = field_names(Event)
    for event in EVENTS:
        yield f"\n## `{event.name}`\n"
        yield f"{_text(event)} Level {event.level}.\n"
        yield "| key | type | meaning |"
        yield "| --- | --- | --- |"
        yield from _rows(event, tuple(name for name in field_names(event) if name not in common))
    yield ""


def _rows(event: type[Event], names: tuple[str, ...]) -> Iterator[str]:
    hints = get_type_hints(event, include_extras=True)
    for name in names:
        kind, meaning = get_args(hints[name])
        shown = getattr(kind, "__name__", "") if not get_args(kind) else str(kind).replace(" | ", " or ")
        yield f"| `{name}` | {shown} | {meaning} |"


def _text(event: type[Event]) -> str:
    return " ".join((inspect.getdoc(event) or "").replace("``", "`").split())
