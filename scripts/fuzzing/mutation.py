"""Changes to JSON that leave it JSON. Of documents with changed bytes, a parser refuses nearly all."""

import json
import random
from typing import Any

import atheris

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e300, float("inf"), float("nan")),
    *(1 << 31, (1 << 62) - 1, 1 << 63, -(1 << 63), 10**30, 10**400),
    *("", "a", "1", "[/]", "\ud800", "inf", [], {}, [0], [[0]], [1, [2]], {"a": 1}),
)


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a value in one line, repeat a line, or (one time in three) change bytes."""
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    if rng.randrange(3):
        try:
            document = json.loads(lines[number])
        except (ValueError, RecursionError):
            return bytes(atheris.Mutate(data, max_size))
        lines[number] = json.dumps(_changed(document, rng)).encode()
    elif rng.randrange(2):
        lines.insert(rng.randrange(len(lines) + 1), lines[number])
    else:
        return bytes(atheris.Mutate(data, max_size))
    changed = b"\n".join(lines)
    return changed if len(changed) <= max_size else bytes(atheris.Mutate(data, max_size))


def _changed(node: Any, rng: random.Random) -> Any:
    """Return a document in which one value is changed, removed or repeated, at any depth."""
    if isinstance(node, dict) and node and rng.randrange(8):
        key = rng.choice(list(node))
        if rng.randrange(10):
            return {**node, key: _changed(node[key], rng)}
        return {name: value for name, value in node.items() if name != key}
    if isinstance(node, list) and node and rng.randrange(8):
        place = rng.randrange(len(node))
        if rng.randrange(4):
            return [*node[:place], _changed(node[place], rng), *node[place + 1 :]]
        return node[:place] + node[place + 1 :] if rng.randrange(2) else node + node[place:]
    if isinstance(node, int) and not isinstance(node, bool) and rng.randrange(2):
        return node + rng.choice((-1, 1))
    return rng.choice(_VALUES)
