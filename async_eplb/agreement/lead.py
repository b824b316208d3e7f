"""How far ahead a fence is: further after a step had to wait, nearer after many decisions without a wait."""

from dataclasses import dataclass

MAX_LEAD = 64
"""Boundaries that a fence is ahead at most."""
_CALM_DECISIONS = 64
"""Decisions without a wait after which the lead is halved."""


@dataclass(slots=True)
class Lead:
    """Boundaries from the last one passed to a new fence, at least 1.

    :param least: where it begins, and what it never goes below
    :param calm: decisions since the last wait, or since the lead was halved
    """

    least: int
    boundaries: int
    calm: int = 0

    def waited(self) -> None:
        """Double the lead, because a step had to wait at its fence."""
        self.boundaries = min(2 * self.boundaries, MAX_LEAD)
        self.calm = 0

    def decided(self) -> None:
        """Count a decision; halve the lead after many in a row without a wait."""
        self.calm += 1
        if self.calm >= _CALM_DECISIONS:
            self.calm = 0
            self.boundaries = max(self.least, self.boundaries // 2)
