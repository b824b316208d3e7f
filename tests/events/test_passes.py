"""Forward passes are timed, beside updates and without; what is no pass is not counted."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import ANY

import anyio
import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture
from support.helpers import TINY, memory_world, on_all, until
from support.logs import PASSES

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    LayerCommit,
    MemoryTransport,
    SyncUpdater,
    UpdaterStatistics,
)
from async_eplb.events.emit import Logger
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.passes import BOUNDS_MS, PAUSE_S, PERIOD_S, PassTimer, PassTotals, percentiles

ALONE = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
OLD, NEW = (ExpertPlacement.from_mapping([row]) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))


class Clock:
    """A clock of the serving thread that stands still but when it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Set the clock that steps are timed with."""
    made = Clock()
    monkeypatch.setattr("async_eplb.agreement.steps.time", made)
    return made


class Timed:
    """A pass timer, what it hands over, and steps of any length."""

    def __init__(self) -> None:
        self.generation, self.now_s, self.num_handed_over = 0, 100.0, 0
        self.timer = PassTimer(lambda: self.generation, self._note)

    def _note(self) -> None:
        self.num_handed_over += 1

    def step(self, after_s: float = 0.0, step_s: float = 0.0) -> None:
        """Make a forward pass of some time, and then a step that takes some time."""
        start_s = self.now_s + after_s
        self.now_s = start_s + step_s
        self.timer.passed(start_s, self.now_s)

    def events(self) -> list[tuple[int, str, int, int, float]]:
        """Return the periods that were handed over: generation, beside, passes, pauses, longest."""
        events = [period.event(generation=9, rank=0, step=0) for period in self.timer.periods()]
        return [(e.generation, e.beside, e.num_passes, e.num_pauses, round(e.max_ms, 6)) for e in events]


def test_a_pass_lasts_from_the_end_of_a_step_to_that_of_the_next() -> None:
    """The first step ends none."""
    timed = Timed()
    for after_s, step_s in ((0.5, 0.5), (0.25, 0.125), (0.5, 0.0)):
        timed.step(after_s, step_s)
    timed.timer.close()
    assert timed.events() == [(9, "nothing", 2, 0, 500.0)]
    assert timed.timer.alone == PassTotals(2, 875.0, 500.0)
    assert timed.timer.alone.mean_ms == 437.5
    assert timed.timer.beside == PassTotals()
    assert timed.timer.beside.mean_ms == 0.0


def test_passes_at_an_updates_beginning_and_end_are_beside_it() -> None:
    """Passes before, beside and after each update are handed over at the first step that is no more of their kind."""
    timed = Timed()
    handed_over = []
    for generation in (0, 0, 0, 1, 1, 0, 0, 2, 3, 0, 0):
        timed.generation = generation
        timed.step(0.5)
        handed_over.append(timed.num_handed_over)
    assert handed_over == [0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5]
    timed.timer.close()
    assert timed.events() == [
        (9, "nothing", 2, 0, 500.0),
        (1, "update", 3, 0, 500.0),
        (9, "nothing", 1, 0, 500.0),
        (2, "update", 1, 0, 500.0),
        (3, "update", 2, 0, 500.0),
        (9, "nothing", 1, 0, 500.0),
    ]
    assert (timed.timer.beside.num, timed.timer.alone.num) == (6, 4)


def test_passes_are_handed_over_once_a_minute() -> None:
    """At a step: nothing runs only to look at the clock."""
    timed = Timed()
    for _ in range(int(2.5 * PERIOD_S)):
        timed.step(1.0)
    assert timed.num_handed_over == 2
    assert [num for _, _, num, _, _ in timed.events()] == [PERIOD_S, PERIOD_S + 1]
    assert list(timed.timer.periods()) == []


def test_no_traffic_is_no_pass() -> None:
    """Counted apart; a long wait inside a step is a long pass."""
    timed = Timed()
    timed.step()
    timed.step(PAUSE_S)
    timed.step(PAUSE_S - 1.0, 20.0)
    timed.timer.close()
    assert timed.events() == [(9, "nothing", 1, 1, 24_000.0)]


def test_a_gap_that_is_skipped_is_neither() -> None:
    """Passes are counted again from the next step on; nothing is handed over without a pass."""
    timed = Timed()
    for _ in range(3):
        timed.step(1.0)
        timed.timer.skip()
    timed.timer.close()
    assert timed.num_handed_over == 0
    timed.step(1.0)
    timed.step(1.0)
    timed.timer.close()
    assert timed.events() == [(9, "nothing", 1, 0, 1000.0)]


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 4.0), min_size=1, max_size=14))
def test_what_is_logged_of_passes_is_what_they_took(times_s: list[float]) -> None:
    """Number, mean and maximum are exact, percentiles right to a fifth, and times are known by buckets of BOUNDS_MS."""
    timed = Timed()
    timed.step()
    for each in times_s:
        timed.step(0.0, each)
    timed.timer.close()
    (event,) = (period.event(generation=1, rank=0, step=0) for period in timed.timer.periods())
    times_ms = 1e3 * np.array(times_s)
    assert event.num_passes == sum(event.num_passes_by_time) == len(times_s)
    assert event.mean_ms == pytest.approx(times_ms.mean(), abs=1e-6)
    assert event.max_ms == pytest.approx(times_ms.max(), abs=1e-6)
    assert event.times_ms == sorted(event.times_ms)
    for percent, estimate in ((50, event.p50_ms), (99, event.p99_ms)):
        exact = float(np.percentile(times_ms, percent, method="inverted_cdf"))
        assert estimate == pytest.approx(exact, rel=0.2, abs=BOUNDS_MS[0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 50)), max_size=20), st.floats(0.0, 100.0))
def test_percentiles_are_those_of_all_passes(counted: list[tuple[float, int]], percent: float) -> None:
    """In any order, with equal times; of none, they are unknown."""
    times_ms, nums = [time for time, _ in counted], [num for _, num in counted]
    (found,) = percentiles(times_ms, nums, [percent])
    if not counted:
        assert np.isnan(found)
        return
    assert found == np.percentile(np.repeat(times_ms, nums), percent, method="inverted_cdf")


@contextmanager
def logged() -> Iterator[tuple[Logger, list[dict[str, Any]]]]:
    """Give a logger, and what it has logged of passes."""
    capture = LogCapture()
    passes: list[dict[str, Any]] = []
    wrapper = structlog.make_filtering_bound_logger(logging.DEBUG)
    yield structlog.wrap_logger(None, processors=[capture], wrapper_class=wrapper), passes
    entries = ({k: v for k, v in entry.items() if k != "log_level"} for entry in capture.entries)
    passes += [entry for entry in entries if entry["event"] == PASSES["event"]]


async def passes_of(updater: ExpertUpdater, clock: Clock, *times_s: float) -> None:
    """Make a step, and forward passes that take so long."""
    await updater.step()
    for time_s in times_s:
        clock.now_s += time_s
        await updater.step()


@pytest.mark.anyio
async def test_passes_are_logged_completely(clock: Clock) -> None:
    """What is left is logged when the updater is left."""
    with logged() as (logger, passes):
        async with memory_world(OLD, ALONE, loggers=[logger]) as ranks:
            await passes_of(ranks[0].updater, clock, 0.25, 0.25, 1.0, 0.25)
    assert passes == [PASSES]


@pytest.mark.anyio
async def test_an_update_is_told_from_what_is_around_it(clock: Clock) -> None:
    """Passes before and beside it are logged while the updater lives, and statistics tell them apart."""
    seen: list[str] = []
    with logged() as (target, passes):
        logger = EventLogger(target, observers=[lambda event: seen.append(event["event"])])
        async with memory_world(OLD, ALONE, loggers=[logger]) as ranks:
            updater = ranks[0].updater
            await passes_of(updater, clock, 0.25, 0.25)
            handle = updater.begin(NEW)
            num_passes = 0
            while not handle.done:
                clock.now_s += 0.5
                await updater.step()
                num_passes += 1
                await anyio.sleep(0.001)
            for _ in range(3):
                clock.now_s += 0.25
                await updater.step()
            await until(lambda: seen.count(PASSES["event"]) == 2)
            statistics: UpdaterStatistics = updater.statistics()
        assert statistics.passes_beside_updates.longest_ms == 500.0
        assert statistics.other_passes.mean_ms == 250.0
        assert statistics.passes_beside_updates.num + statistics.other_passes.num == num_passes + 5
    assert [(each["beside"], each["generation"]) for each in passes] == [
        ("nothing", ANY),
        ("update", 1),
        ("nothing", 1),
    ]
    assert passes[1]["num_passes"] == statistics.passes_beside_updates.num in (num_passes, num_passes + 1)
    assert passes[1]["max_ms"] == 500.0


@pytest.mark.anyio
@pytest.mark.parametrize("stand", ["idle", "paused", "update", "recover"])
async def test_standing_is_no_pass(stand: str, clock: Clock) -> None:
    """Nor is an update while nobody serves; passes before are logged at once where the rank stands."""
    with logged() as (logger, passes):
        async with memory_world(OLD, ALONE, loggers=[logger]) as ranks:
            updater = ranks[0].updater
            await passes_of(updater, clock, 0.25)
            clock.now_s += 1.0
            if stand == "update":
                await updater.update(NEW)
            elif stand == "recover":
                await updater.recover(MemoryTransport.world(1)[0])
            else:
                async with updater.idle() if stand == "idle" else updater.paused():
                    clock.now_s += 1.0
            clock.now_s += 1.0
            await passes_of(updater, clock, 0.25)
            assert updater.statistics().other_passes == PassTotals(2, 500.0, 250.0)
    assert sum(each["num_passes"] for each in passes) == 2
    assert len(passes) == (1 if stand == "update" else 2)


@pytest.mark.anyio
async def test_a_step_that_fails_ends_no_pass(clock: Clock) -> None:
    """Nor does the next one, which would be two in one."""

    def fail(_commit: LayerCommit) -> None:
        raise ZeroDivisionError

    async with memory_world(OLD, ALONE, on_commit=[fail]) as ranks:
        updater = ranks[0].updater
        updater.begin(NEW)
        failed = False
        while not failed:
            clock.now_s += 0.5
            try:
                await updater.step()
            except ZeroDivisionError:
                failed = True
            await anyio.sleep(0.001)
        before = updater.statistics()
        clock.now_s += 0.5
        await updater.step()
        assert updater.statistics().passes_beside_updates == before.passes_beside_updates
        assert updater.statistics().other_passes == before.other_passes


def test_the_serving_thread_logs_nothing() -> None:
    """It only counts; the event loop's thread logs."""
    threads: dict[str, set[int]] = {}

    def observe(event: Mapping[str, Any]) -> None:
        threads.setdefault(event["event"], set()).add(threading.get_ident())

    updater = SyncUpdater(
        ExpertWeights(TINY.weights(OLD, ALONE, 0)),
        OLD,
        ALONE,
        rank=0,
        transport=MemoryTransport.world(1)[0],
        logger=EventLogger(observers=[observe]),
    )
    with updater:
        updater.step()
        handle = updater.begin(NEW)
        while not handle.done:
            updater.step()
        handle.wait()
        updater.step()
        updater.step()
    assert threading.get_ident() not in threads[PASSES["event"]]


@pytest.mark.anyio
async def test_all_ranks_log_their_own(clock: Clock) -> None:
    """With their number."""
    two = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
    seen: list[int] = []
    loggers = [EventLogger(observers=[lambda event: seen.append(event["rank"])]) for _ in range(2)]
    async with memory_world(OLD, two, loggers=loggers) as ranks:
        await on_all(ranks, lambda updater: passes_of(updater, clock, 0.25))
    assert sorted(seen) == [0, 1]
