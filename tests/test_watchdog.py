"""A stage that makes no progress ends in one event that says what all stages do, and in a typed error."""

from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import pytest
import structlog
import trio
import trio.testing
from helpers import memory_world, together
from structlog.testing import CapturingLogger

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.errors import UpdateAborted, UpdateStalled
from async_eplb.testing import ScheduledWorkers
from async_eplb.transport import MemorySchedule
from async_eplb.workers import Workers

T = TypeVar("T")

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
OLD, NEW = (ExpertPlacement.from_mapping([row] * 3) for row in ([0, 1, 2, 3], [1, 0, 3, 2]))
"""All copies stay on their rank, so that no exchange times out first."""
OPTIONS = UpdateOptions(transfer_timeout_s=1.0, control_timeout_s=2.0, progress_timeout_s=5.0)
SCHEDULE = MemorySchedule(control_s=0.01)
"""A round takes a time; without it the clock would stand while ranks wait."""


class HangingWorkers(ScheduledWorkers):
    """Workers of which one kind takes very long."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        if kind == self._kind:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(8.0)
        return await super().run(kind, function)


def stalled_events(logger: CapturingLogger) -> list[dict[str, Any]]:
    """Return the events of a stall."""
    return [call.kwargs for call in logger.calls if call.kwargs["event"] == "eplb.update.stalled"]


@pytest.mark.parametrize(("kind", "stage"), [("plan", "plan"), ("finish", "commit"), ("commit", "commit")])
def test_a_stage_that_hangs(kind: str, stage: str) -> None:
    """The rank that hangs says where; its peer hears of it."""
    loggers = [CapturingLogger() for _ in range(2)]
    workers = iter([ScheduledWorkers(), HangingWorkers(kind)])

    async def update() -> list[Any]:
        wrapped = [structlog.wrap_logger(logger, processors=[]) for logger in loggers]
        async with memory_world(
            OLD,
            TOPOLOGY,
            schedule=SCHEDULE,
            options=OPTIONS,
            workers=lambda: next(workers),
            loggers=wrapped,
        ) as ranks:
            return await together([lambda u=rank.updater: u.update(NEW) for rank in ranks])  # type: ignore[misc]

    first, second = trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    assert isinstance(second, UpdateStalled)
    assert (second.stage, second.layer) == (stage, 0)
    assert isinstance(first, UpdateAborted | UpdateStalled)
    (event,) = stalled_events(loggers[1])
    assert event["stage"] == stage
    assert len(event["buffers"]) == len(event["rank_states"]) == 2
    assert any(text.startswith(stage) for text in event["stages"])


def test_nobody_steps() -> None:
    """Layers that wait for a step for ever: the error says so, and a step is refused from then on."""

    async def update() -> list[Any]:
        async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
            handles = [rank.updater.begin(NEW) for rank in ranks]
            outcomes = await together([handle.wait for handle in handles])
            assert all(rank.updater.placement == OLD for rank in ranks)
            return outcomes

    for outcome in trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0)):
        assert isinstance(outcome, UpdateStalled | UpdateAborted)


def test_progress_is_no_stall() -> None:
    """An update that takes longer than the deadline, but each stage does not."""

    def workers() -> Workers:
        return ScheduledWorkers({"plan": 3.0, "transfer": 0.5, "commit": 1.0})

    async def update() -> float:
        async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, workers=workers) as ranks:
            await together([lambda u=rank.updater: u.update(NEW) for rank in ranks])  # type: ignore[misc]
            assert all(rank.updater.placement == NEW for rank in ranks)
            return float(trio.current_time())

    start = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(update, clock=start) > OPTIONS.progress_timeout_s
