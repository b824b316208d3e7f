"""When one rank fails, the failure is what the others hear of."""

from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import pytest
import trio
import trio.testing
from support.helpers import memory_world, together

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import CommitFailed, UpdateAborted
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import MemorySchedule
from async_eplb.workers import Workers

T = TypeVar("T")

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
OLD, NEW = (ExpertPlacement.from_mapping([row] * 4) for row in ([0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]))
"""All copies stay on their rank, so that ranks hear of each other in control rounds only."""

TRANSFER_S, ROUND_S, COMMIT_S = 0.05, 0.125, 0.06
FAILS_AT_S = TRANSFER_S + ROUND_S + 2 * TRANSFER_S + ROUND_S + COMMIT_S
"""Plan, agree to begin, fill and check a layer, agree to commit it. The next round is under way by then."""


class FailingWorkers(ScheduledWorkers):
    """Workers whose first commit fails."""

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        if kind == "commit":
            await anyio.sleep(COMMIT_S)
            raise OSError("out of luck")
        return await super().run(kind, function)


@pytest.mark.parametrize("cancel_at_s", [None, FAILS_AT_S + 0.02], ids=["alone", "then cancelled"])
def test_a_failure_is_heard_of_everywhere(cancel_at_s: float | None) -> None:
    """Also if the caller of the failed rank goes away before the failure is reported."""
    kinds = iter([ScheduledWorkers, FailingWorkers, ScheduledWorkers])

    def workers() -> Workers:
        return next(kinds)({"transfer": TRANSFER_S, "commit": COMMIT_S})

    async def update() -> list[Any]:
        schedule = MemorySchedule(control_s=ROUND_S)
        async with memory_world(OLD, TOPOLOGY, schedule=schedule, workers=workers) as ranks:

            async def update_rank_1() -> None:
                with anyio.move_on_after(cancel_at_s):
                    await ranks[1].updater.update(NEW)

            began_s = trio.current_time()
            outcomes = await together(
                [
                    lambda: ranks[0].updater.update(NEW),
                    update_rank_1,
                    lambda: ranks[2].updater.update(NEW),
                ]
            )
            return [*outcomes, trio.current_time() - began_s]

    first, second, third, took_s = trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    assert isinstance(second, CommitFailed) == (cancel_at_s is None)
    assert second is None or (second.rank, second.layer, second.phase) == (1, 0, "commit")
    assert [type(outcome) for outcome in (first, third)] == [UpdateAborted] * 2
    assert first.ranks == third.ranks == (1,)
    assert took_s < FAILS_AT_S + 2 * ROUND_S
