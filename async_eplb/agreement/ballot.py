"""The messages of a control round, and the result of a round.

Counts are prefix lengths in update order, in waves: the minimum over ranks holds everywhere. A wave is one layer, until
several are staged together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

from async_eplb.errors import InvalidBallot


class Status(IntEnum):
    """Whether a rank can go on with the update, or how its last one ended."""

    OK = 0
    CANCEL = 1
    FAILED = 2
    LEAVING = 3
    IN_DOUBT = 4
    """Its layers may differ from other ranks', until all of them recover together."""
    GIVEN_UP = 5
    """The update has failed and is over here, whether other ranks have begun it or not."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """The message that one rank gives in one round.

    :param generation: number of the update, counted from 1
    :param digest: of everything that must be equal on all ranks
    :param staged: waves whose staging is full on this rank
    :param launchable: waves that have a plan and buffers
    :param finished: waves whose commit copies are done on the device
    :param fence: boundary that this rank promises not to pass before the round's result, 0 without one
    :param status: one of :class:`Status`
    :param step: boundaries that this rank has passed
    :param standing: 1 if it makes no steps at present
    :param demanded: rebalances that this rank has demanded or knows that another has
    """

    generation: int
    digest: int
    staged: int
    launchable: int
    finished: int
    fence: int
    status: Status
    step: int = 0
    standing: int = 0
    demanded: int = 0

    def describe(self) -> str:
        """Return the ballot in words, for a log."""
        return (
            f"staged {self.staged}, launchable {self.launchable}, finished {self.finished}, fence {self.fence}, "
            f"step {self.step}, {self.status.name}"
        )

    @classmethod
    def size(cls) -> int:
        """Return how many integers a ballot is on the wire."""
        return len(_NAMES)

    def to_row(self) -> tuple[int, ...]:
        """Return the ballot as 64-bit integers."""
        return tuple([int(getattr(self, name)) for name in _NAMES])

    @classmethod
    def from_row(cls, row: Sequence[int]) -> "Ballot":
        """Read what :meth:`to_row` wrote.

        :raises InvalidBallot: if it is no ballot
        """
        if len(row) != len(_NAMES) or row[_STATUS_PLACE] not in _STATUSES or min(row) < 0:
            raise InvalidBallot(
                f"a rank's ballot is {list(row)}: it does not run this version, or something else talks to the control "
                "group",
                row=tuple(row),
            )
        numbers = [int(number) for number in row]
        numbers[_STATUS_PLACE] = _STATUSES[numbers[_STATUS_PLACE]]
        return cls(*numbers)  # type: ignore[arg-type]


_NAMES = tuple(field.name for field in fields(Ballot))


_STATUS_PLACE = _NAMES.index("status")


_STATUSES = {int(status): status for status in Status}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one round, the same on every rank that the round counts for.

    :param boundary: the step boundary of what was decided; 0 if nothing was, or if it holds at once
    :param agreed: waves that may be committed, in all rounds so far
    :param launched: waves that may be launched, in all rounds so far
    :param over: nothing is left to agree on
    :param cancelled: ranks that cancelled in this round
    :param failed: ranks that failed in this round
    :param gone: ranks that close their updater; no round follows
    :param waiting_for: ranks that have not begun this update
    """

    boundary: int = 0
    agreed: int = 0
    launched: int = 0
    over: bool = False
    cancelled: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    waiting_for: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """At ``boundary``, first commit all waves up to ``copied``, then launch all parts up to ``parts_launched``.

    :param copied: waves, as a prefix of the update
    :param parts_launched: parts, counted over all waves of the update
    """

    boundary: int
    copied: int
    parts_launched: int
