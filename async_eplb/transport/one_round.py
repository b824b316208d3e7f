"""A single control round, in which every rank gives a row of integers and receives the rows of all ranks."""

from collections.abc import Sequence

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.base import ControlGroup


class _OneRound:
    """Gives a row in one round and keeps the rows of all ranks."""

    def __init__(self, row: Sequence[int]) -> None:
        self._row = row
        self.rows: list[list[int]] = []
        self.lost: BrokenControlGroup | None = None

    def pause_s(self) -> float:
        return 0.0

    def ballot(self) -> Sequence[int]:
        return self._row

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        self.rows = [list(row) for row in rows]
        return False

    def lose(self, error: BrokenControlGroup) -> None:
        self.lost = error


def require_recent(elapsed_s: float, rank: int, timeout_s: float) -> None:
    """Raise BrokenControlGroup if peers may have given this rank up, and moved on, since the last round.

    Their ballots may be there all the same: a process that was stopped must not join a round that they gave up.

    :param elapsed_s: since this rank had the last round's result, in seconds
    :param timeout_s: how long peers wait for a ballot, in seconds
    """
    if elapsed_s > timeout_s:
        raise BrokenControlGroup(
            f"rank {rank}: this process stood still for {elapsed_s:.1f} s; other ranks have given it up",
            rank=rank,
            timeout_s=timeout_s,
        )


async def hold_round(control: ControlGroup, row: Sequence[int]) -> list[list[int]]:
    """Return the rows of all ranks, in rank order; all ranks call this together, with rows of the same length.

    :param row: 64-bit integers of this rank
    :raises BrokenControlGroup: if a rank does not answer
    """
    voter = _OneRound(row)
    await control.run(voter)
    if voter.lost is not None:
        raise voter.lost
    return voter.rows
