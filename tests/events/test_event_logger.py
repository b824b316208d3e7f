"""Events turned down by kind, and shown to observers."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import emit
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.schema import FenceWaited, UpdateFailed

FENCE = FenceWaited(generation=1, rank=3, step=2, duration_ms=0.5, lead=2)
FAILED = UpdateFailed(
    generation=1, rank=3, step=2, duration_ms=0.5, error="UpdateCancelled", error_message="", committed_layers=[]
)


def logged(levels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return names and levels of what is logged of two events."""
    capture = LogCapture()
    logger = EventLogger(structlog.wrap_logger(None, processors=[capture]), levels=levels)
    emit(logger, FENCE)
    emit(logger, FAILED)
    return [(entry["event"], entry["log_level"]) for entry in capture.entries]


def test_events_are_turned_down_by_kind() -> None:
    """The others keep the level of their schema."""
    assert logged({}) == [("eplb.fence.waited", "warning"), ("eplb.update.failed", "warning")]
    assert logged({"eplb.fence.waited": "debug"})[0] == ("eplb.fence.waited", "debug")
    assert logged({"eplb.fence.waited": "off"}) == [("eplb.update.failed", "warning")]


def test_observers_see_what_is_off_and_what_was_bound() -> None:
    """The whole event, with its run."""
    seen: list[Mapping[str, Any]] = []
    capture = LogCapture()
    logger = EventLogger(
        structlog.wrap_logger(None, processors=[capture]), levels={"eplb.fence.waited": "off"}, observers=[seen.append]
    )
    emit(logger.bind(run_id="some run"), FENCE)
    emit(logger.bind(run_id="some run"), FAILED)
    assert [(event["event"], event["run_id"]) for event in seen] == [
        ("eplb.fence.waited", "some run"),
        ("eplb.update.failed", "some run"),
    ]
    assert seen[1] == {key: value for key, value in capture.entries[0].items() if key != "log_level"}


def test_importing_brings_no_extra_and_configures_nothing() -> None:
    """Neither structlog nor standard logging; nor does a report load what draws."""
    code = """
import logging, sys, structlog
others = set(sys.modules)
before = (list(logging.root.handlers), logging.root.level)
import async_eplb, async_eplb.report
from async_eplb import *
assert 'torch' in sys.modules
assert not structlog.is_configured()
assert (list(logging.root.handlers), logging.root.level) == before
assert [type(each) for each in logging.getLogger("async_eplb").handlers] == [logging.NullHandler]
loaded = {"matplotlib", "prometheus_client", "opentelemetry", "rich"} & (set(sys.modules) - others)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("levels", [{"eplb.fence.missed": "off"}, {"eplb.fence.waited": "loud"}])
def test_unknown_events_and_levels_are_refused(levels: dict[str, str]) -> None:
    """So that a slip of the pen is not silence."""
    with pytest.raises(InvalidOptions):
        EventLogger(levels=levels)
