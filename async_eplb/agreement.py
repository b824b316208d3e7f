"""What a control round decides: a pure state machine over ballots, without sockets or time.

In each round every rank hands in a :class:`Ballot` and sees all of them, so that all ranks draw the same
:class:`Verdict`. Counts in ballots are prefix lengths in update order; the minimum over ranks holds everywhere.

How an update ends early: no rank can have begun to transfer a layer beyond ``agreed + window``, because each of
its ``window`` staging buffers holds a layer until an agreed commit frees it. So when a round shows a CANCEL,
that number is known to all ranks alike and becomes the update's length: what may be under way is finished and
committed, nothing else is begun, and no posted exchange is left without its other side. After a FAILED nothing
more is committed at all.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

from async_eplb.errors import GenerationMismatch, PlacementDisagreement


class Status(IntEnum):
    """How a rank is."""

    OK = 0
    CANCEL = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one rank says in one round.

    :param generation: number of the update, counted from 1
    :param digest: of everything that must be equal on all ranks
    :param staged: layers whose staging is full on this rank
    :param launchable: layers that have a plan and buffers
    :param committed: layers whose commit copies have finished on the device
    :param fence: boundary that this rank promises not to pass before the round's result, 0 without one
    :param status: OK, CANCEL or FAILED
    """

    generation: int
    digest: int
    staged: int
    launchable: int
    committed: int
    fence: int
    status: Status

    @classmethod
    def size(cls) -> int:
        """Return how many integers a ballot is on the wire."""
        return len(fields(cls))

    def to_row(self) -> tuple[int, ...]:
        """Return the ballot as 64-bit integers."""
        return tuple(int(value) for value in astuple(self))

    @classmethod
    def from_row(cls, row: Sequence[int]) -> "Ballot":
        """Read what :meth:`to_row` wrote."""
        generation, digest, staged, launchable, committed, fence, status = (int(value) for value in row)
        return cls(generation, digest, staged, launchable, committed, fence, Status(status))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one round decided, the same on every rank.

    :param agreed: layers that are staged everywhere and may be committed
    :param over: nothing is left to do
    :param cancelled: ranks that cancelled in this round
    :param failed: ranks that failed in this round
    """

    agreed: int
    over: bool
    cancelled: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


class Agreement:
    """One update's agreement, seen from one rank, in the exclusive mode.

    The owner advances :attr:`staged` and :attr:`committed`, hands in :meth:`ballot` whenever :meth:`has_news`, and
    gives what the round returned to :meth:`receive`.

    :param total: layers of the update
    :param window: layers that can be staged and not yet agreed, the depth of the staging pool
    """

    def __init__(self, *, generation: int, digest: int, total: int, window: int) -> None:
        self.generation = generation
        self.digest = digest
        self.window = window
        self.limit = total
        self.staged = 0
        self.committed = 0
        self.status = Status.OK
        self.begun = False
        self.over = False
        self.agreed = 0
        self._ending = False

    def __repr__(self) -> str:
        return (
            f"<Agreement generation {self.generation}: {self.staged} staged, {self.agreed} agreed, "
            f"{self.committed} committed of {self.limit}, {self.status.name}>"
        )

    def cancel(self) -> None:
        """Ask for the end of the update, unless something worse has happened."""
        if self.status is Status.OK:
            self.status = Status.CANCEL

    def fail(self) -> None:
        """Say that this rank cannot go on."""
        self.status = Status.FAILED

    def ballot(self) -> Ballot:
        """Return what this rank says in its next round."""
        return Ballot(
            generation=self.generation,
            digest=self.digest,
            staged=self.staged,
            launchable=self.staged,
            committed=self.committed,
            fence=0,
            status=self._pending_status(),
        )

    def has_news(self) -> bool:
        """Whether this rank should join the next round now.

        A rank that holds the minimum back waits until it has moved; the others join at once. So each round
        completes as soon as the slowest rank has something to say, and always decides something.
        """
        return (
            not self.begun
            or self._pending_status() is not Status.OK
            or self.staged > self.agreed
            or self.committed >= self.limit
        )

    def receive(self, ballots: Sequence[Ballot]) -> Verdict:
        """Take in one round's ballots, in rank order.

        :raises GenerationMismatch: if ranks have begun different numbers of updates
        :raises PlacementDisagreement: if ranks began the same update with different inputs
        """
        self._require_same_update(ballots)
        failed = tuple(rank for rank, ballot in enumerate(ballots) if ballot.status is Status.FAILED)
        cancelled = tuple(rank for rank, ballot in enumerate(ballots) if ballot.status is Status.CANCEL)
        if failed:
            self.over = True
            return Verdict(self.agreed, over=True, failed=failed, cancelled=cancelled)
        if cancelled and not self._ending:
            self._ending = True
            self.limit = min(self.limit, self.agreed + self.window) if self.begun else 0
        else:
            self.agreed = min(self.limit, *(ballot.staged for ballot in ballots))
        self.begun = True
        self.over = min(ballot.committed for ballot in ballots) >= self.limit
        return Verdict(self.agreed, over=self.over, cancelled=cancelled)

    def _pending_status(self) -> Status:
        """A cancellation is said until some round has shown one; a failure always."""
        return Status.OK if self._ending and self.status is Status.CANCEL else self.status

    def _require_same_update(self, ballots: Sequence[Ballot]) -> None:
        generations = tuple(ballot.generation for ballot in ballots)
        if len(set(generations)) > 1:
            raise GenerationMismatch(
                f"ranks begin updates number {list(generations)} together; "
                "every rank must begin every update, in the same order",
                generations=generations,
            )
        digests = tuple(ballot.digest for ballot in ballots)
        common = max(set(digests), key=lambda digest: (digests.count(digest), -digests.index(digest)))
        ranks = tuple(rank for rank, digest in enumerate(digests) if digest != common)
        if ranks:
            raise PlacementDisagreement(
                f"ranks {list(ranks)} began update {self.generation} with another placement, topology, weight layout "
                "or options than the others; nothing was moved",
                digests=digests,
                ranks=ranks,
            )
