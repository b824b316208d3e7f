"""A meeting of all ranks that blocks no event loop, before they are connected."""

from collections.abc import Sequence
from functools import partial

import anyio

from async_eplb.groups import LOOK_S, Board, late
from async_eplb.workers import Work, Workers


async def meet(workers: Workers, board: Board, what: str, text: str, *, timeout_s: float) -> list[str]:
    """Leave a text, and return those of all ranks, in rank order.

    :param what: names the texts; once for each board
    :raises OpenTimeout: if a rank has left none in time; it names all of these
    """
    await workers.run(Work.CONNECT, partial(board.put, f"{what}/{board.rank}", text))
    with anyio.move_on_after(timeout_s):
        return await texts_at(workers, board, [f"{what}/{rank}" for rank in range(board.num_ranks)])
    raise await workers.run(Work.CONNECT, partial(late, board, what, timeout_s))


async def texts_at(workers: Workers, board: Board, keys: Sequence[str]) -> list[str]:
    """Return the texts of these keys when they are there."""
    while True:
        texts = await workers.run(Work.CONNECT, partial(board.get, keys))
        if texts is not None:
            return texts
        await anyio.sleep(LOOK_S)
