"""Control rounds between ranks in memory."""

from collections.abc import Sequence

import anyio
from anyio import Event

from async_eplb.errors import BrokenControlGroup
from async_eplb.transport.base import Voter
from async_eplb.transport.memory.world import CONNECT_TIMEOUTS, MemoryWorld, Round
from async_eplb.transport.one_round import require_recent


class MemoryControlGroup:
    """One rank's part in the rounds of its world. A ballot ends the pauses of the ranks that have given none yet."""

    def __init__(self, world: MemoryWorld, rank: int, timeout_s: float) -> None:
        self._world = world
        self._rank = rank
        self._timeout_s = timeout_s
        self._round = 0
        self._news = Event()
        world.wakes[rank] = self.wake

    async def run(self, voter: Voter) -> None:
        """Run rounds until the voter ends them, or a rank does not answer."""
        last_s = anyio.current_time()
        try:
            while True:
                with anyio.move_on_after(voter.pause_s()):
                    await self._news.wait()
                require_recent(anyio.current_time() - last_s, self._rank, self._timeout_s)
                if not voter.receive(await self._gather(voter.ballot())):
                    return
                last_s = anyio.current_time()
        except BrokenControlGroup as error:
            voter.lose(error)

    def wake(self) -> None:
        """End the pause before the next round."""
        self._news.set()

    async def _gather(self, row: Sequence[int]) -> list[list[int]]:
        world, number = self._world, self._round
        self._round += 1
        this = world.rounds.setdefault(number, Round())
        rows = this.rows
        if self._rank not in world.dead:
            rows[self._rank] = list(row)
        for rank, wake in world.wakes.items():
            if rank not in rows:
                wake()
        self._news = Event()
        if len(rows) == world.num_ranks:
            del world.rounds[number]
            this.over.set()
        if world.dead - set(rows):
            this.over.set()
        patience = 1 if number else CONNECT_TIMEOUTS
        with anyio.move_on_after(self._timeout_s * patience):
            await this.over.wait()
        await anyio.sleep(world.schedule.control_s + world.random.uniform(0, world.schedule.control_jitter_s))
        lost = (self._rank, number) in world.schedule.lost_results
        if len(rows) < world.num_ranks or lost:
            missing = sorted(set(range(world.num_ranks)) - set(rows))
            reason = f"the result of round {number} was lost" if lost else f"no ballot from ranks {missing}"
            raise BrokenControlGroup(
                f"rank {self._rank}: {reason} within {self._timeout_s} s",
                rank=self._rank,
                timeout_s=self._timeout_s,
                missing=tuple(missing),
            )
        return [rows[rank] for rank in range(world.num_ranks)]
