"""What the ranks agree on before each forward pass, and what they remember of it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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

    def history(self, chunk: int = 10) -> list[tuple[float, float]]:
        """Return when each chunk of passes began, and the ranks' balance in it (see :func:`balancedness`)."""
        records = list(self.records)
        chunks = [records[start : start + chunk] for start in range(0, len(records) - chunk + 1, chunk)]
        return [(part[0].begun_s, balancedness([record.rank_rows for record in part])) for part in chunks]


def balancedness(rank_rows: Sequence[Sequence[Sequence[int]]]) -> float:
    """Return mean over max of the ranks' rows, averaged over layers; 1 where there are none.

    :param rank_rows: rows by pass, rank and layer
    """
    by_layer = np.sum(np.asarray(rank_rows), axis=0).T
    shares = [1.0 if not rows.any() else float(rows.mean() / rows.max()) for rows in by_layer]
    return sum(shares) / len(shares)
