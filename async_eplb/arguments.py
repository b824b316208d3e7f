"""Numbers and choices that users give: taken in one form, whatever their type, or refused by name.

A number of Python, numpy or torch is taken as Python's own, so that equal ones are written and compared alike. A bool,
a string or an array is no number, and a float is no whole number, even if it is 36.0.
"""

import math
import numbers
import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from async_eplb.errors import EplbError

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Kind(Protocol[T_co]):
    """What an argument must be; its ``str`` completes "it must be"."""

    def of(self, value: object) -> T_co:
        """Return a value of Python's own types in its one form.

        :raises ValueError: if it is not of this kind, as do TypeError and OverflowError
        """
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from ``least`` to ``most``, taken as an int."""

    least: int
    most: int | None = None

    def of(self, value: object) -> int:
        """Return the int."""
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError
        number = int(value)
        if number < self.least or (self.most is not None and number > self.most):
            raise ValueError
        return number

    def __str__(self) -> str:
        limits = f"of at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        return f"a whole number {limits}"


@dataclass(frozen=True, slots=True)
class Real:
    """A number from ``least`` to ``most``, taken as a float.

    :param most: finite, so that infinity is refused; infinite to take it
    :param above: ``least`` itself is too little
    """

    least: float = 0.0
    most: float = sys.float_info.max
    above: bool = False

    def of(self, value: object) -> float:
        """Return the float."""
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not self.least <= number <= self.most or (self.above and number == self.least):
            raise ValueError
        return number

    def __str__(self) -> str:
        least = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        most = {math.inf: "", sys.float_info.max: ", and finite"}.get(self.most, f" and at most {self.most:g}")
        return f"a number of {least}{most}"


DEADLINE_S = Real(0, 1e9, above=True)
"""Seconds to wait for something: up to thirty years, since clocks of torch end at 300."""


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    def of(self, value: object) -> bool:
        """Return the bool."""
        if not isinstance(value, bool):
            raise TypeError
        return value

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of some strings."""

    choices: tuple[str, ...]

    def of(self, value: object) -> str:
        """Return the choice."""
        if not isinstance(value, str):
            raise TypeError
        return self.choices[self.choices.index(value)]

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"


@dataclass(frozen=True, slots=True)
class OrNone(Kind[T | None]):
    """None, or what another kind takes."""

    kind: Kind[T]

    def of(self, value: object) -> T | None:
        """Return the value."""
        return None if value is None else self.kind.of(value)

    def __str__(self) -> str:
        return f"{self.kind}, or None"


@dataclass(frozen=True, slots=True)
class SetOf(Kind[frozenset[T]]):
    """Several of another kind, from anything that can be iterated over."""

    kind: Kind[T]

    def of(self, value: object) -> frozenset[T]:
        """Return the set."""
        return frozenset(self.kind.of(_element(each)) for each in value)  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"several, each {self.kind}"


def take(value: object, kind: Kind[T], name: str, error: Callable[..., EplbError]) -> T:
    """Return an argument in the one form of its kind.

    :param name: of the argument; the error has it as ``option``
    :param error: class of the error
    :raises EplbError: of that class, if the argument is not of its kind
    """
    try:
        return kind.of(_element(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise error(f"{name} is {reprlib.repr(value)}; it must be {kind}", option=name) from None


def settle(instance: object, error: Callable[..., EplbError], **kinds: Kind[object]) -> None:
    """Take fields of a frozen dataclass, in its ``__post_init__``.

    :param kinds: by the name of the field
    :raises EplbError: as :func:`take`
    """
    for name, kind in kinds.items():
        object.__setattr__(instance, name, take(getattr(instance, name), kind, name, error))


def _element(value: object) -> object:
    """Return the element of an array or tensor without dimensions, or of a scalar of numpy; all else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value  # type: ignore[attr-defined]
