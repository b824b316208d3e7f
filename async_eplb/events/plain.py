"""Values of any kind as text and as JSON: nothing that is logged is refused for what it is."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_MAX_DEPTH = 20
_SUSPECT = re.compile(r"\\ud|-\d{19}|\d{20}")
"""What JSON can spell and not every reader can read: halves of surrogate pairs, integers beyond 64 bits."""


def shown(value: object, how: Callable[[Any], str] = repr) -> str:
    """Return the text of a value, whatever its class makes of ``repr``."""
    try:
        return how(value)
    except Exception:  # noqa: BLE001 - the code of any class
        return f"<{type(value).__name__} that cannot be shown>"


def json_line(event: Mapping[str, Any]) -> bytes:
    """Return an event as one line of JSON in ASCII, with its line end; see :func:`plain` for odd values.

    :raises Exception: if keys or values are of classes so odd that even this fails
    """
    try:
        text = json.dumps(event, default=shown, allow_nan=False)
    except Exception:  # noqa: BLE001 - a value that is no JSON, or the code of its class
        text = ""
    if not text or _SUSPECT.search(text):
        text = json.dumps({_key(key): plain(value) for key, value in event.items()})
    return text.encode() + b"\n"


def plain(value: object, within: tuple[int, ...] = ()) -> object:
    """Return a value as all readers of JSON can read it.

    NaN and infinities are None. Integers beyond 64 bits, containers inside themselves or 20 levels deep, and whatever
    else JSON has no form for, are their ``repr``. Halves of surrogate pairs are spelled out with a backslash.

    :param within: ids of the containers that it is in
    """
    try:
        return _plain(value, within)
    except Exception:  # noqa: BLE001 - the code of its class
        return shown(value)


def _plain(value: object, within: tuple[int, ...]) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return value
    if isinstance(value, dict | list | tuple) and id(value) not in within and len(within) < _MAX_DEPTH:
        inside = (*within, id(value))
        if isinstance(value, dict):
            return {_key(key): plain(each, inside) for key, each in value.items()}
        return [plain(each, inside) for each in value]
    text = value if isinstance(value, str) else shown(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _key(key: object) -> object:
    return plain(shown(key) if isinstance(key, tuple) else key)
