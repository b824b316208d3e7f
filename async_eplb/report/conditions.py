"""Conditions on a report's figures, for CI: ``stall_p99_ms > 2``."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from async_eplb.errors import InvalidOptions

_OPERATORS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_FORM = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|==|!=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A figure, an operator and a limit: a run fails if the comparison is true."""

    figure: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure} {self.operator} {self.limit:g}"

    def broken_by(self, figures: Mapping[str, float]) -> str:
        """Return the reason to fail a run; empty if there is none. A figure that is not in the log is a reason."""
        value = figures[self.figure]
        if math.isnan(value):
            return f"{self.figure} is not in this log, so that {self} cannot be ruled out"
        return f"{self}: it is {value:g}" if _OPERATORS[self.operator](value, self.limit) else ""


def parse_condition(text: str, known: Mapping[str, float]) -> Condition:
    """Parse ``FIGURE OPERATOR NUMBER``.

    :param known: existing figures
    :raises InvalidOptions: if the text has another form, or names an unknown figure
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise InvalidOptions(
            f"--fail-if {text!r}: write FIGURE OPERATOR NUMBER, as in 'stall_p99_ms > 2'", option="fail_if"
        )
    figure, sign, limit = match.groups()
    if figure not in known:
        raise InvalidOptions(
            f"--fail-if {text!r}: there is no {figure}; there are {', '.join(known)}", option="fail_if"
        )
    try:
        return Condition(figure, sign, float(limit))
    except ValueError as error:
        raise InvalidOptions(f"--fail-if {text!r}: {limit} is no number", option="fail_if") from error
