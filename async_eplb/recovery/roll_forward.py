"""The layer in doubt: survivors commit what any of them has committed, from staging that was kept."""

from collections.abc import Collection, Sequence

from async_eplb.errors import Unrecoverable
from async_eplb.transport.base import ControlGroup
from async_eplb.transport.one_round import hold_round
from async_eplb.update.rank import Rank
from async_eplb.update.run import UpdateRun
from async_eplb.update.state import RankState


async def roll_forward(
    rank: Rank, state: RankState, control: ControlGroup, members: Sequence[int], goal: Sequence[int]
) -> tuple[int, ...]:
    """Commit the layers that any survivor has committed; return those that were behind here (agreement rule 6).

    :param goal: of each row, how often it has been replaced on the rank that is ahead
    :raises Unrecoverable: if a rank has no bytes of such a layer
    """
    run = state.failed_run
    has: list[int] = rank.expert_map.layer_generation.tolist()
    behind = [row for row, (mine, wanted) in enumerate(zip(has, goal, strict=True)) if mine < wanted]
    kept = () if run is None else tuple(layer.planned.row for layer in run.kept)
    follows = all(row in kept and goal[row] == has[row] + 1 for row in behind)
    can = [row[0] for row in await hold_round(control, [int(follows)])]
    if not all(can):
        ranks = tuple(number for number, able in zip(members, can, strict=True) if not able)
        raise Unrecoverable(
            f"ranks {list(ranks)} have no bytes of layers that others have committed; start these ranks anew",
            ranks=ranks,
            layers=tuple(behind),
        )
    if run is not None:
        try:
            await _commit_kept(run, behind)
        finally:
            has = rank.expert_map.layer_generation.tolist()
            done = tuple(row for row in behind if has[row] == goal[row])
            state.placement = state.placement.with_layers(run.update.new, done)
    return tuple(behind)


async def _commit_kept(run: UpdateRun, rows: Collection[int]) -> None:
    """Commit those of ``rows`` whose staging was kept, and give all kept staging back.

    :raises CommitFailed: if a layer cannot be copied; its staging is kept for another try
    """
    while run.kept:
        layer = run.kept[0]
        if layer.planned.row in rows:
            await run.boundary.copy_again(layer)
        run.pool.release(layer.buffer)
        run.kept = run.kept[1:]
