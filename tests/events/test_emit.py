"""Where events go if no logger is passed, and that nothing a listener raises gets out."""

import logging
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture
from support.helpers import memory_world, on_all, two_placements

from async_eplb import EPTopology, ExpertUpdater, UpdateOptions
from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import StandardLogger, default_logger, emit, guarded
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.schema import FenceWaited

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
OLD, NEW = two_placements(TOPOLOGY, 2, 4)
FENCE = FenceWaited(generation=1, rank=3, step=2, duration_ms=0.5, lead=2)


@pytest.fixture
def configured() -> Iterator[LogCapture]:
    """structlog, configured by an application."""
    capture = LogCapture()
    structlog.configure(processors=[capture])
    yield capture
    structlog.reset_defaults()


def test_events_go_to_standard_logging_with_their_fields(caplog: pytest.LogCaptureFixture) -> None:
    """In the message, and as attributes of the record."""
    emit(default_logger().bind(run_id="some run"), FENCE)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("async_eplb", "WARNING")
    fields = "run_id='some run' generation=1 rank=3 layer=None step=2 duration_ms=0.5 lead=2"
    assert record.getMessage() == f"eplb.fence.waited {fields}"
    assert (record.event, record.lead, record.run_id) == ("eplb.fence.waited", 2, "some run")  # type: ignore[attr-defined]
    assert {"schema_version", "monotonic_s", "wall_s", "layer"} <= set(vars(record))


def test_fields_never_hide_what_records_have_themselves(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever an application binds; values that cannot be shown are survived."""

    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    names = (*vars(logging.makeLogRecord({})), "message", "asctime", "event", "logger", "self", "bound")
    logger = StandardLogger(logging.getLogger("some.engine"), dict.fromkeys(names, "mine"))
    logger.bind(odd=Odd(), logger="other").warning("eplb.some.event", process=7)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("some.engine", "WARNING")
    assert (record.process_, record.logger) == (7, "other")  # type: ignore[attr-defined]
    assert "odd=<Odd that cannot be shown>" in record.getMessage()


@pytest.mark.parametrize("level", ["debug", "info", "warning"])
def test_levels_are_those_of_the_schema(level: str, caplog: pytest.LogCaptureFixture) -> None:
    """And what the application does not want to see is not made text."""
    caplog.set_level(logging.DEBUG, "async_eplb")
    getattr(default_logger(), level)("eplb.some.event", number=1)
    assert [record.levelname for record in caplog.records] == [level.upper()]
    caplog.set_level(logging.CRITICAL, "async_eplb")
    getattr(default_logger(), level)("eplb.some.event", number=1)
    assert len(caplog.records) == 1


def test_nothing_is_printed_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    """An application that has set up nothing sees nothing of it."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        emit(default_logger(), FENCE)
    finally:
        root.handlers = handlers
    assert capfd.readouterr() == ("", "")


def test_an_application_may_configure_structlog_at_any_time(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """Also after its updater was made."""
    logger = guarded(None, run_id="some run")
    emit(logger, FENCE)
    capture = request.getfixturevalue("configured")
    emit(logger, FENCE)
    assert [(entry["event"], entry["run_id"]) for entry in capture.entries] == [("eplb.fence.waited", "some run")]
    assert len(caplog.records) == 1


def test_events_have_the_name_of_an_updater_that_has_one(caplog: pytest.LogCaptureFixture) -> None:
    """A target and a draft model in one process can be told apart."""
    emit(guarded(None, run_id="some run", updater="draft"), FENCE)
    emit(guarded(None, run_id="some run"), FENCE)
    assert [getattr(record, "updater", "no name") for record in caplog.records] == ["draft", "no name"]


@pytest.mark.parametrize("logger", [logging.getLogger("some"), object(), "logger", structlog.testing.CapturingLogger])
def test_what_is_no_logger_is_refused(logger: Any) -> None:
    """When an updater is made, with a hint."""
    for use in (partial(guarded, run_id=""), EventLogger):
        with pytest.raises(InvalidOptions, match="StandardLogger"):
            use(logger)


class Deaf:
    """Raises at every event, as a logger, an observer, or when it is shown."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.num_asked = 0

    def bind(self, **_values: object) -> "Deaf":
        return self

    def __call__(self, *_arguments: object, **_values: object) -> None:
        self.num_asked += 1
        raise self.error

    debug = info = warning = __call__


ERRORS = [RuntimeError("deaf"), ExceptionGroup("deaf", [OSError()]), structlog.DropEvent(), RecursionError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_logger_raises_is_counted_and_told_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The count is exact, from any number of threads."""
    logger = guarded(Deaf(error), run_id="")

    def emit_many() -> None:
        for _ in range(100):
            emit(logger, FENCE)

    threads = [threading.Thread(target=emit_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logger.num_lost == 400
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("async_eplb", "WARNING")
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), anyio.get_cancelled_exc_class, GeneratorExit()])
def test_what_is_no_exception_passes(error: Any) -> None:
    """A cancellation, or Ctrl-C, is nobody's fault."""
    if callable(error):
        error = BaseExceptionGroup("cancelled", [KeyboardInterrupt()])
    logger = guarded(Deaf(error), run_id="")
    with pytest.raises(type(error)):
        emit(logger, FENCE)
    with pytest.raises(type(error)):
        emit(guarded(EventLogger(observers=[Deaf(error)]), run_id=""), FENCE)
    assert logger.num_lost == 0


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_one_listener_that_raises_keeps_nothing_from_the_others(error: Exception) -> None:
    """The event counts as lost once."""
    capture, seen = LogCapture(), list[Mapping[str, Any]]()
    deaf = Deaf(error)
    inner = structlog.wrap_logger(None, processors=[capture])
    logger = guarded(EventLogger(inner, observers=[deaf, seen.append, deaf]), run_id="")
    emit(logger, FENCE)
    assert (len(seen), len(capture.entries), deaf.num_asked, logger.num_lost) == (1, 1, 2, 1)


def updating(logger: Any, *, serving: bool) -> list[ExpertUpdater]:
    """Move two layers on two ranks whose logger this is; return the updaters."""

    async def run() -> list[ExpertUpdater]:
        options = UpdateOptions(log_inputs=True, log_decisions=True, lead=1)
        async with memory_world(OLD, TOPOLOGY, options=options, loggers=[logger] * 2) as ranks:
            if serving:
                handles = [rank.updater.begin(NEW) for rank in ranks]
                while not all(handle.done for handle in handles):
                    await on_all(ranks, ExpertUpdater.step)
                    await anyio.sleep(0.001)
                for handle in handles:
                    await handle.wait()
            else:
                for summary in await on_all(ranks, lambda u: u.update(NEW)):
                    assert summary.layers == (0, 1)
            assert all(rank.updater.placement == NEW for rank in ranks)
            return [rank.updater for rank in ranks]

    return anyio.run(run)


@pytest.mark.parametrize("serving", [False, True])
def test_an_update_ends_well_whatever_its_loggers_raise(*, serving: bool) -> None:
    """At every event; what was lost is in the statistics."""
    observer = Deaf(RuntimeError("deaf"))
    updaters = updating(EventLogger(observers=[observer]), serving=serving)
    assert sum(updater.statistics().num_events_lost for updater in updaters) == observer.num_asked >= 2 * 10
    assert all(updater.statistics().num_updates_finished == 1 for updater in updaters)


class Ends(BaseException):
    """Is no fault of a listener."""


def test_nobody_waits_for_an_update_whose_last_event_was_interrupted() -> None:
    """What is no fault ends the updater's tasks; the update has ended before."""

    def interrupt(event: Mapping[str, Any]) -> None:
        if event["event"] == "eplb.update.finished":
            raise Ends

    summaries = []

    async def run() -> None:
        async with memory_world(OLD, TOPOLOGY, loggers=[EventLogger(observers=[interrupt])] * 2) as ranks:
            summaries.extend(await on_all(ranks, lambda u: u.update(NEW)))

    with pytest.raises(BaseExceptionGroup):
        anyio.run(run)
    assert [summary.layers for summary in summaries] == [(0, 1)] * 2


def test_errors_that_cannot_be_shown_are_logged() -> None:
    """As the hook of an application may raise them."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def hook(_layer: object) -> None:
        raise Mute

    events = list[Mapping[str, Any]]()

    async def run() -> list[Any]:
        loggers = [EventLogger(observers=[events.append])] * 2
        async with memory_world(OLD, TOPOLOGY, loggers=loggers, on_commit=[hook, lambda _layer: None]) as ranks:
            return await on_all(ranks, lambda u: u.update(NEW))

    assert isinstance(anyio.run(run)[0], Mute)
    assert {event["error_message"] for event in events if event.get("error") == "Mute"} == {
        "<Mute that cannot be shown>"
    }


def test_an_update_that_fails_raises_its_own_error() -> None:
    """Not what the logger raises at the event of the failure."""
    deaf = Deaf(RuntimeError("deaf"))

    async def run() -> list[Any]:
        async with memory_world(OLD, TOPOLOGY, loggers=[deaf] * 2) as ranks:
            return await on_all(ranks, lambda u: u.update(NEW if u.rank else OLD))

    errors = anyio.run(run)
    assert {type(error).__name__ for error in errors} == {"PlacementDisagreement"}
