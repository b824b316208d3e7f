"""Sums of loads over ranks, in a thread and a gloo group of their own: never on the serving path."""

from datetime import timedelta
from functools import partial

import anyio
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

from async_eplb.arguments import DEADLINE_S, take
from async_eplb.device import DeviceEvent
from async_eplb.errors import BrokenLoadGroup, InvalidOptions, OpenTimeout
from async_eplb.groups import gather, join
from async_eplb.workers import Interruptible, ThreadWorkers, Work, Workers


class LocalLoadGroup:
    """The load group of a rank alone: waits for counts without blocking the caller."""

    num_ranks = 1

    def __init__(self, workers: Workers | None = None) -> None:
        self._workers = workers or ThreadWorkers()

    async def sum(self, counts: Tensor, after: DeviceEvent | None = None) -> Tensor:
        """Return the sum; waits in a thread.

        A cancelled sum ends as a cancelled one, also where closing the group made it fail.
        """
        try:
            return await self._workers.run(Work.LOAD, Interruptible(partial(self._finish, counts, after), self.close))
        except BrokenLoadGroup:
            await anyio.lowlevel.checkpoint_if_cancelled()
            raise

    def close(self) -> None:
        """Do nothing: there are no connections."""

    def _finish(self, counts: Tensor, after: DeviceEvent | None) -> Tensor:
        if after is not None:
            after.synchronize()
        return counts.clone(memory_format=torch.contiguous_format)


class GlooLoadGroup(LocalLoadGroup):
    """The load group of the processes of a torch.distributed group.

    The constructor connects them, which blocks; so :meth:`open` calls it in a thread.

    :param store: where ranks find each other; its keys must be unused
    :param workers: where sums are waited for; threads without it
    :param timeout_s: how long a sum waits for the slowest rank
    """

    def __init__(
        self, store: Store, rank: int, num_ranks: int, workers: Workers | None = None, *, timeout_s: float
    ) -> None:
        super().__init__(workers)
        self.num_ranks = num_ranks
        self._group = ProcessGroupGloo(store, rank, num_ranks, timedelta(seconds=timeout_s))
        self._rank = rank
        self._timeout_s = timeout_s

    @classmethod
    async def open(
        cls, group: ProcessGroup | None = None, *, workers: Workers | None = None, timeout_s: float = 60.0
    ) -> "GlooLoadGroup":
        """Connect the processes of a group, in a thread. All of them open their load groups in the same order.

        :param group: the EP group, of which this process must be a member; the world without it. It is only used to
            find the other ranks.
        :param workers: where this and sums are waited for; threads without it
        :param timeout_s: how long to wait for the slowest rank, here and in each sum, in seconds
        :raises InvalidGroup: if there is no group, or it has no store; :class:`NotAMember` if this process is not in it
        :raises InvalidOptions: if ``timeout_s`` is no number of seconds
        :raises BrokenLoadGroup: if another process does not connect in time; it names those that did not come
        """
        timeout_s = take(timeout_s, DEADLINE_S, "timeout_s", InvalidOptions)
        workers = workers or ThreadWorkers()
        return await workers.run(Work.LOAD, partial(cls._connect, group, workers, timeout_s))

    @classmethod
    def _connect(cls, group: ProcessGroup | None, workers: Workers, timeout_s: float) -> "GlooLoadGroup":
        board = join(group, "load group")
        try:
            gather(board, "open", "", timeout_s)
            return cls(board.own, board.rank, board.num_ranks, workers, timeout_s=timeout_s)
        except OpenTimeout as error:
            raise BrokenLoadGroup(str(error), rank=board.rank, timeout_s=timeout_s, missing=error.missing) from error
        except RuntimeError as error:
            raise _broken(board.rank, timeout_s, error) from error

    def close(self) -> None:
        """Close the connections, from any thread. A sum under way ends with an error, here and on the other ranks.

        Close it when every rank has cancelled its sums: one that not all ranks began then ends at once, instead of
        at its timeout.
        """
        self._group.abort()

    def _finish(self, counts: Tensor, after: DeviceEvent | None) -> Tensor:
        own = super()._finish(counts, after)
        try:
            self._group.allreduce([own]).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise _broken(self._rank, self._timeout_s, error) from error
        return own


def _broken(rank: int, timeout_s: float, error: RuntimeError) -> BrokenLoadGroup:
    return BrokenLoadGroup(
        f"rank {rank}: loads were not summed within {timeout_s} s; a rank is dead, closed, or did not take part "
        f"({error})",
        rank=rank,
        timeout_s=timeout_s,
    )
