"""A stage that makes no progress ends in one event that lists the state of all stages, and in a typed error."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import anyio
import pytest
import structlog
import trio
import trio.testing
from structlog.testing import CapturingLogger
from support.helpers import MemoryRank, memory_world, on_all, together, two_placements, until

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.errors import UpdateAborted, UpdateStalled
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.update.handle import UpdateHandle
from async_eplb.update.watchdog import Doing, Watchdog
from async_eplb.workers import Workers

T = TypeVar("T")

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
OLD, NEW = (ExpertPlacement.from_mapping([row] * 3) for row in ([0, 1, 2, 3], [1, 0, 3, 2]))
"""All copies stay on their rank, so that no exchange times out first."""
OPTIONS = UpdateOptions(transfer_timeout_s=1.0, control_timeout_s=2.0, progress_timeout_s=5.0)
SCHEDULE = MemorySchedule(control_s=0.01)
"""A round takes time; otherwise virtual time would not pass while ranks wait."""


FAR_AHEAD = replace(OPTIONS, lead=32)
"""Agreed layers wait for many steps."""


class HangingWorkers(ScheduledWorkers):
    """Workers of which one kind takes very long once, after some times."""

    def __init__(self, kind: str, *, after: int = 0, hangs_s: float = 8.0) -> None:
        super().__init__()
        self._kind = kind
        self._left = after
        self._hangs_s = hangs_s

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        if kind == self._kind:
            self._left -= 1
            if self._left == -1:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(self._hangs_s)
        return await super().run(kind, function)


class FailingWorkers(ScheduledWorkers):
    """Workers that fail once at one kind of work, after some times."""

    def __init__(self, kind: str, *, after: int) -> None:
        super().__init__()
        self._kind = kind
        self._left = after

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        if kind == self._kind:
            self._left -= 1
            if self._left == -1:
                await anyio.sleep(1.0)
                raise OSError("no luck")
        return await super().run(kind, function)


def stalled_events(logger: CapturingLogger) -> list[dict[str, Any]]:
    """Return the events of a stall."""
    return [call.kwargs for call in logger.calls if call.kwargs["event"] == "eplb.update.stalled"]


@pytest.mark.parametrize(("kind", "stage"), [("plan", "plan"), ("finish", "commit"), ("commit", "commit")])
def test_a_stage_that_hangs(kind: str, stage: str) -> None:
    """The error of the rank that hangs names the stage; its peer gets an error too."""
    options = replace(OPTIONS, verify="canary")  # what is not verified takes no time after a commit
    loggers = [CapturingLogger() for _ in range(2)]
    workers = iter([ScheduledWorkers(), HangingWorkers(kind)])

    async def update() -> list[Any]:
        wrapped = [structlog.wrap_logger(logger, processors=[]) for logger in loggers]
        async with memory_world(
            OLD,
            TOPOLOGY,
            schedule=SCHEDULE,
            options=options,
            workers=lambda: next(workers),
            loggers=wrapped,
        ) as ranks:
            return await on_all(ranks, lambda u: u.update(NEW))

    first, second = trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    assert isinstance(second, UpdateStalled)
    assert (second.stage, second.layer) == (stage, 0)
    assert isinstance(first, UpdateAborted | UpdateStalled)
    event, *later = stalled_events(loggers[1])
    assert event["stage"] == stage
    assert [(other["stage"], other["layer"]) for other in later] == [(stage, 1)] * len(later)
    assert len(event["buffers"]) == len(event["rank_states"]) == 2
    assert any(text.startswith(stage) for text in event["stages"])


@pytest.mark.parametrize("launch_rule", LaunchRule)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_pause_is_no_stall(num_ranks: int, launch_rule: LaunchRule) -> None:
    """No steps for five times the time-out, at every moment of an update: it goes on with the next ones, and ends."""
    topology = EPTopology(num_ranks=num_ranks, num_nodes=1, num_local_physical_experts=2)
    old, new = two_placements(topology, num_layers=2, num_experts=3)
    schedule = replace(SCHEDULE, launch_rule=launch_rule)

    async def update(pause_after: int) -> bool:
        async with memory_world(old, topology, schedule=schedule, options=OPTIONS) as ranks:
            handles = [rank.updater.begin(new) for rank in ranks]
            number = 0
            while not all(handle.done for handle in handles):
                await on_all(ranks, lambda u: u.step())
                number += 1
                await anyio.sleep(5 * OPTIONS.progress_timeout_s if number == pause_after else 0.05)
            await together([handle.wait for handle in handles])
            for rank in ranks:
                assert rank.updater.placement == new
                rank.assert_consistent()
            return number >= pause_after

    for pause_after in range(20):
        if not trio.run(update, pause_after, clock=trio.testing.MockClock(autojump_threshold=0)):
            break
    assert pause_after > 3


def test_a_clock_that_stands_still_is_looked_at_now_and_then() -> None:
    """However little is left of the time of something that waits for steps: nobody spins while traffic pauses."""

    async def watch() -> int:
        start, looks = trio.current_time(), 0

        def steps() -> float:
            nonlocal looks
            looks += 1
            return min(trio.current_time() - start, 2.125)  # no step comes afterwards

        watchdog = Watchdog(1.0, steps)
        with watchdog.doing("agree", 0, Doing.AWAIT_STEP), watchdog.doing("plan", 1, Doing.PLAN):
            await trio.sleep(0.06)
            assert (await watchdog.until_stalled()).stage == "plan"
            with trio.move_on_after(100.0):
                await watchdog.until_stalled()
        return looks

    assert trio.run(watch, clock=trio.testing.MockClock(autojump_threshold=0)) < 1000


def test_progress_is_no_stall() -> None:
    """An update that takes longer than the deadline, but each stage does not."""

    def workers() -> Workers:
        return ScheduledWorkers({"plan": 3.0, "transfer": 0.5, "commit": 1.0})

    async def update() -> float:
        async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, workers=workers) as ranks:
            await on_all(ranks, lambda u: u.update(NEW))
            assert all(rank.updater.placement == NEW for rank in ranks)
            return float(trio.current_time())

    start = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(update, clock=start) > OPTIONS.progress_timeout_s


def where_one_rank_steps(workers: ScheduledWorkers, logger: CapturingLogger) -> list[Any]:
    """Update where the second rank stops to step, and does so only at the end; return how it ended on each.

    :param workers: of the second rank, like the logger
    """
    each_workers = iter([ScheduledWorkers(), workers])

    async def step(rank: MemoryRank, handles: list[UpdateHandle], pause_s: float) -> None:
        await anyio.sleep(pause_s)
        while not all(handle.done for handle in handles):
            await rank.updater.step()
            await anyio.sleep(0.5)

    async def update() -> list[Any]:
        wrapped = [structlog.wrap_logger(each, processors=[]) for each in (CapturingLogger(), logger)]
        async with memory_world(
            OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, workers=lambda: next(each_workers), loggers=wrapped
        ) as ranks:
            handles = [rank.updater.begin(NEW) for rank in ranks]
            pauses = (0.0, 3 * OPTIONS.progress_timeout_s)
            with anyio.fail_after(25.0):
                await together([partial(step, rank, handles, s) for rank, s in zip(ranks, pauses, strict=True)])
            outcomes = await together([handle.wait for handle in handles])
            assert ranks[0].updater.placement == ranks[1].updater.placement
            for rank in ranks:
                rank.assert_consistent()
            await on_all(ranks, lambda u: u.update(OLD))
            assert all(rank.updater.placement == OLD for rank in ranks)
            return outcomes

    return trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_rank_that_does_not_step_hurts_nobody() -> None:
    """The error names the wait; what was agreed is committed at the next step, and the next update works."""
    logger = CapturingLogger()
    first, second = where_one_rank_steps(ScheduledWorkers(), logger)
    assert isinstance(first, UpdateAborted)
    assert isinstance(second, UpdateStalled)
    event, *_ = stalled_events(logger)
    assert event["doing"] == "waiting for a step"


def test_a_stall_after_another_is_no_less_seen() -> None:
    """Planning hangs while an agreed layer waits for a step: both are told."""
    logger = CapturingLogger()
    first, second = where_one_rank_steps(HangingWorkers("plan", after=1), logger)
    assert isinstance(first, UpdateAborted)
    assert isinstance(second, UpdateStalled)
    assert [event["stage"] for event in stalled_events(logger)] == ["plan", "agree"]


def test_a_stage_that_failed_does_nothing_any_more() -> None:
    """It makes no progress either, but that is no stall."""
    logger = CapturingLogger()
    _, second = where_one_rank_steps(FailingWorkers("plan", after=1), logger)
    assert isinstance(second, OSError)
    (event,) = stalled_events(logger)
    assert event["doing"] == "waiting for a step"
    assert event["stages"] == ["agree: layer number 0, waiting for a step"]


def test_a_copy_under_way_is_not_given_up() -> None:
    """A rank goes idle just before its time-out: the layer is copied, as everywhere, and no rank is blocked."""
    workers = iter([ScheduledWorkers(), HangingWorkers("commit", hangs_s=4.0)])

    async def update() -> None:
        async with memory_world(
            OLD, TOPOLOGY, schedule=SCHEDULE, options=FAR_AHEAD, workers=lambda: next(workers)
        ) as ranks:
            handles = [rank.updater.begin(NEW) for rank in ranks]
            await anyio.sleep(2 * OPTIONS.progress_timeout_s - 1.0)

            async def stand(rank: int) -> None:
                async with ranks[rank].updater.idle():
                    await handles[rank].wait()

            assert await together([lambda: stand(0), lambda: stand(1)]) == [None, None]
            for rank in ranks:
                assert rank.updater.placement == NEW
                rank.assert_consistent()

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


def test_patience_with_steps_begins_when_a_layer_is_agreed() -> None:
    """A peer that took its time to stage a layer leaves as much for the step."""
    workers = iter([ScheduledWorkers(), HangingWorkers("transfer", after=1, hangs_s=4.0)])

    async def update() -> None:
        async with memory_world(
            OLD, TOPOLOGY, schedule=SCHEDULE, options=FAR_AHEAD, workers=lambda: next(workers)
        ) as ranks:
            start = anyio.current_time()
            handles = [rank.updater.begin(NEW, layers=[0]) for rank in ranks]
            with anyio.fail_after(20.0):
                await until(lambda: ranks[0].updater.outlook.agreed == 1)
            assert anyio.current_time() > start + 4.0
            await anyio.sleep(2 * OPTIONS.progress_timeout_s - 2.0)

            async def serve(rank: int) -> None:
                for _ in range(FAR_AHEAD.lead + 1):
                    await ranks[rank].updater.step()
                await handles[rank].wait()

            assert await together([lambda: serve(0), lambda: serve(1)]) == [None, None]
            assert all(rank.updater.placement == NEW.with_layers(OLD, (1, 2)) for rank in ranks)

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_transport_that_cannot_be_aborted_is_no_reason_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stall ends the update all the same, and the error tells of the abort."""
    workers = iter([ScheduledWorkers(), HangingWorkers("commit")])

    def abort() -> None:
        raise OSError("no abort")

    async def update() -> list[object]:
        async with memory_world(
            OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, workers=lambda: next(workers)
        ) as ranks:
            monkeypatch.setattr(ranks[1].transport, "abort", abort)
            with anyio.fail_after(60.0):
                return await on_all(ranks, lambda u: u.update(NEW))

    outcomes = trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    assert [type(outcome) for outcome in outcomes] == [UpdateAborted, UpdateStalled]
    assert "could not be aborted: OSError('no abort')" in "".join(outcomes[1].__notes__)  # type: ignore[attr-defined]
