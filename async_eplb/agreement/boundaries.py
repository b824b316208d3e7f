"""Where one rank is among step boundaries: those passed, the fence that it waits at, and what is due at later ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from async_eplb.agreement.ballot import Decision


@dataclass(slots=True)
class Boundaries:
    """One rank's boundaries, over the life of an updater. Boundaries are counted from 1; 0 is none.

    :param step: boundaries passed
    :param fence: boundary that is not passed before the open round's result is known; 0 without one
    :param fence_wanted: whether the next ballot carries a fence
    :param last: the latest boundary that something was decided for
    :param standing: whether this rank makes no steps at present
    :param stood_before: the most boundaries that any rank had passed when all ranks stood last; 0 if they do not
    :param decisions: what is due, by ascending boundary
    """

    step: int = 0
    fence: int = 0
    fence_wanted: bool = False
    last: int = 0
    standing: bool = False
    stood_before: int = 0
    decisions: tuple[Decision, ...] = ()

    def clear(self) -> None:
        """Drop all decisions, before another update begins."""
        self.fence_wanted, self.stood_before, self.decisions = False, 0, ()

    def put_up_fence(self, lead: int) -> None:
        """Promise not to pass a boundary ahead: the next one if this rank stands, which makes no steps."""
        # Agreement rule 1. A fence is behind all that was decided before, so that its loss keeps no step from that.
        self.fence = self.step + 1 if self.standing else max(self.step + lead, self.last + 1)

    def may_pass(self, number: int = 0) -> bool:
        """Return whether a boundary may be passed now; otherwise a round's result must come first.

        :param number: of the boundary; without it, the next one
        """
        return not self.fence or (number or self.step + 1) < self.fence

    def pass_next(self, number: int = 0) -> Decision | None:
        """Pass a boundary; return what is due there, and at those before it.

        :param number: of the boundary, later than all passed; without it, the next one
        :raises RuntimeError: if that would break a promise; and nothing happens
        """
        number = number or self.step + 1
        if not self.may_pass(number):
            raise RuntimeError(f"boundary {number} is behind the fence: {self!r}")
        self.step = number
        return self._due(self.step)

    def due_next(self) -> Decision | None:
        """Return what is due at the next boundary, while this rank stands before it without passing."""
        return self._due(self.step + 1)

    def due_ever(self) -> Decision | None:
        """Return all that is due at boundaries to come, for a rank that makes no more steps."""
        return self._due(self.last)

    def decide(self, boundary: int, agreed: int, parts: Sequence[int]) -> None:
        """Add what was decided, in place of what was due at this boundary or later.

        :param agreed: waves that are committed at the boundary
        :param parts: parts launched up to the boundary, and up to each one after it
        """
        later = (Decision(boundary + number, agreed, launched) for number, launched in enumerate(parts))
        self.decisions = (*(each for each in self.decisions if each.boundary < boundary), *later)
        self.last = self.decisions[-1].boundary

    def _due(self, boundary: int) -> Decision | None:
        due = [decision for decision in self.decisions if decision.boundary <= boundary]
        self.decisions = self.decisions[len(due) :]
        return due[-1] if due else None
