"""Values of any kind become one line of JSON that every reader can read."""

import json
import math
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_eplb.events.plain import json_line, shown


class Raises:
    """Cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class ReturnsNoText:
    """Has a repr that is none."""

    def __repr__(self) -> str:
        return 7  # type: ignore[return-value]


class OddDict(dict[str, Any]):
    """Cannot be looked through."""

    def items(self) -> NoReturn:
        raise KeyError("no")

    def __iter__(self) -> Iterator[str]:
        raise KeyError("no")

    __repr__ = Raises.__repr__


class OddList(list[Any]):
    """Cannot be looked through, and says it has elements."""

    def __iter__(self) -> NoReturn:
        raise KeyError("no")

    __repr__ = Raises.__repr__


class Level(IntEnum):
    """A number with a name."""

    HIGH = 3


def recursive() -> list[Any]:
    """Return a list that is in itself, twice."""
    inside: list[Any] = [1]
    inside += [inside, inside]
    return inside


def deep(levels: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def read_back(value: object) -> object:
    """Return what both readers find of a value, in what must be one line."""
    line = json_line({"event": "eplb.some.event", "value": value})
    assert line.isascii()
    assert line.index(b"\n") == len(line) - 1
    event = json.loads(line, parse_constant=pytest.fail)
    assert orjson.loads(line) == event
    assert event["event"] == "eplb.some.event"
    return event["value"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        ([1.5, math.nan], [1.5, None]),
        ({"a": {"b": math.inf}}, {"a": {"b": None}}),
        (np.float64("nan"), None),
        (2**63, 2**63),
        (2**64, str(2**64)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (10**5000, "<int that cannot be shown>"),
        ({10**5000: 1}, {"<int that cannot be shown>": 1}),
        (Level.HIGH, 3),
        ("\ud800", "\\ud800"),
        ({"\udfff": "a\ud800b"}, {"\\udfff": "a\\ud800b"}),
        ("\U0001f600", "\U0001f600"),
        ("two\nlines\u2028", "two\nlines\u2028"),
        (b"\xff\n", "b'\\xff\\n'"),
        ({1}, "{1}"),
        ({(1, 2): 3, None: 4, True: 5, 1.5: 6}, {"(1, 2)": 3, "null": 4, "true": 5, "1.5": 6}),
        ((1, [2]), [1, [2]]),
        (Raises(), "<Raises that cannot be shown>"),
        (ReturnsNoText(), "<ReturnsNoText that cannot be shown>"),
        ([Raises(), 1], ["<Raises that cannot be shown>", 1]),
        ({Raises(): 1, "a": 2}, {"<Raises that cannot be shown>": 1, "a": 2}),
        (OddDict(a=1), "<OddDict that cannot be shown>"),
        (OddList([1]), "<OddList that cannot be shown>"),
        (recursive(), [1, "[1, [...], [...]]", "[1, [...], [...]]"]),
        (torch.float32, "torch.float32"),
    ],
    ids=shown,
)
def test_what_json_has_no_form_for(value: object, expected: object) -> None:
    """Null for numbers that are none, text for the rest."""
    assert read_back(value) == expected


@pytest.mark.parametrize("levels", [19, 500, 3 * sys.getrecursionlimit()])
def test_lists_in_lists(levels: int) -> None:
    """However many: the line can be read. What json cannot write is text from the 20th level on."""
    value, num_lists = read_back(deep(levels)), 0
    while isinstance(value, list):
        value, num_lists = value[0] if value else None, num_lists + 1
    assert num_lists == (levels + 1 if levels <= 500 else 20)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**18, max_value=10**30),
    st.floats(),
    st.text(st.characters()),
    st.binary(),
    st.complex_numbers(),
    st.builds(Raises),
    st.builds(ReturnsNoText),
    st.builds(recursive),
    st.builds(OddDict, a=st.just(1)),
    st.sampled_from([object, np.int64(3), np.zeros(2), torch.zeros(1)]),
)
KEYS = st.one_of(st.text(st.characters()), st.integers(), st.floats(), st.none(), st.tuples(st.integers()))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.tuples(inner, inner), max_leaves=20
)


@settings(max_examples=60)
@given(VALUES)
def test_any_value_is_one_line_that_both_readers_read_alike(value: object) -> None:
    """Whatever is bound to a logger."""
    read_back(value)


@pytest.mark.parametrize("value", [0.1, 1e-320, -(2**63), 2**63 - 1, '"\\\t', "\\ud800", [{"a": [None, True]}]])
def test_what_is_json_stays_as_it_is(value: object) -> None:
    """Numbers keep all their bits."""
    assert read_back(value) == value
