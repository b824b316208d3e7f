"""What the ranks agree on before each forward pass, and what they remember of it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Notice(NamedTuple):
    """What a rank tells the others before a pass.

    :param wave: of the front's messages, the last that arrived here
    :param num_rows: rows that it will compute
    :param has_work: whether it has any request, running or waiting
    :param stopping: whether it was asked to stop
    """

    wave: int
    num_rows: int
    has_work: int
    stopping: int


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What follows from all ranks' notices, the same on every rank.

    :param idle: nobody has work, and nobody has heard of work that another has not
    :param stop: idle, and asked to stop: there will be no further pass
    :param max_rows: rows of the busiest rank
    :param wave: when idle, the last that all ranks have heard of
    """

    idle: bool
    stop: bool
    max_rows: int
    wave: int

    @classmethod
    def of(cls, notices: Sequence[Notice]) -> "PassPlan":
        """Decide."""
        waves = {notice.wave for notice in notices}
        idle = len(waves) == 1 and not any(notice.has_work for notice in notices)
        stop = idle and any(notice.stopping for notice in notices)
        return cls(idle, stop, max(notice.num_rows for notice in notices), max(waves))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """One pass on one rank.

    :param begun_s: on this machine's monotonic clock
    :param step_ms: time inside the boundary's ``step``
    :param pass_ms: time from one boundary to the next, ``step_ms`` included
    :param num_rows: rows of this rank
    :param rank_rows: rows that each rank's experts computed in the pass before, by rank and layer
    """

    number: int
    begun_s: float
    step_ms: float
    pass_ms: float
    num_rows: int
    rank_rows: tuple[tuple[int, ...], ...]


class PassLog:
    """The last passes of a rank.

    :param length: passes remembered
    """

    def __init__(self, length: int = 4096) -> None:
        self.records: deque[PassRecord] = deque(maxlen=length)

    def balancedness(self, num_passes: int) -> float:
        """Return mean over max of the ranks' expert rows, averaged over layers, in the last passes; 1 without any."""
        recent = list(self.records)[-num_passes:]
        if not recent:
            return 1.0
        num_layers = len(recent[0].rank_rows[0])
        shares = []
        for layer in range(num_layers):
            totals = [
                sum(record.rank_rows[rank][layer] for record in recent) for rank in range(len(recent[0].rank_rows))
            ]
            shares.append(sum(totals) / len(totals) / max(totals) if max(totals) else 1.0)
        return sum(shares) / num_layers
