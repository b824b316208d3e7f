"""The state of one update in the agreement: what is agreed on, and how far this rank is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from async_eplb.agreement.ballot import Ballot
from async_eplb.agreement.rules import Mode


@dataclass(frozen=True, slots=True)
class Counts:
    """Minimum over all ranks, as the last round that counted showed it."""

    staged: int = 0
    launchable: int = 0
    finished: int = 0

    @classmethod
    def least(cls, ballots: Sequence[Ballot]) -> "Counts":
        """Return the minimum of each count."""
        counts = attrgetter("staged", "launchable", "finished")
        return cls(*map(min, zip(*map(counts, ballots), strict=True)))


@dataclass(slots=True)
class Agreed:
    """The state of one update: what is agreed on, and this rank's own counts. Each update gets a new one.

    :param limit: waves of the update, fewer after a cancellation
    :param window: waves that can be staged and not yet agreed, the depth of the staging pool
    :param staged: waves that are full here
    :param finished: waves whose commit is done on the device here
    :param parts: of each wave that can be launched here, how many parts it is launched in; the same on all ranks
    :param agreed: waves that may be committed everywhere
    :param launched: waves that may be launched everywhere
    :param begun: all ranks have begun the update with equal inputs
    :param over: nothing is left to agree on
    :param void: it has failed after all ranks had begun, on all of them
    :param ending: a cancellation has set the limit
    """

    mode: Mode = Mode.EXCLUSIVE
    digest: int = 0
    limit: int = 0
    window: int = 0
    staged: int = 0
    finished: int = 0
    parts: tuple[int, ...] = ()
    agreed: int = 0
    launched: int = 0
    begun: bool = False
    over: bool = False
    void: bool = False
    ending: bool = False
    seen: Counts = field(default_factory=Counts)

    @property
    def launchable(self) -> int:
        """Waves that have a plan and buffers here."""
        return len(self.parts)
