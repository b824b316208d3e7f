"""JSON lines: all of them, on time, and counted where the disk takes none."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from support.logs import DROPPED

from async_eplb.errors import InvalidOptions
from async_eplb.events.emit import emit
from async_eplb.events.json_log import JsonLog, configure_json_logging
from async_eplb.events.schema import FenceWaited


def event(step: int) -> FenceWaited:
    """Return an event of one step."""
    return FenceWaited(generation=1, rank=3, step=step, duration_ms=0.5, lead=2)


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a log back; every line is JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_structlog_is_configured_until_the_log_is_closed(tmp_path: Path) -> None:
    """What any structlog logger logs meanwhile is in the file, appended."""
    for _ in range(2):
        with configure_json_logging(tmp_path / "log.jsonl"):
            emit(structlog.get_logger().bind(run_id="some run"), event(1))
            structlog.get_logger().debug("below the level")
        assert not structlog.is_configured()
    (first, second) = lines(tmp_path / "log.jsonl")
    assert first["event"] == second["event"] == "eplb.fence.waited"
    assert (first["step"], first["run_id"], first["level"]) == (1, "some run", "warning")


def test_a_former_configuration_comes_back(tmp_path: Path) -> None:
    """An application that had one has it again."""
    processors: list[structlog.typing.Processor] = [structlog.processors.KeyValueRenderer()]
    structlog.configure(processors=processors)
    try:
        configure_json_logging(tmp_path / "log.jsonl").close()
        assert structlog.get_config()["processors"] is processors
    finally:
        structlog.reset_defaults()


def test_a_log_that_nobody_closes_is_complete_at_the_end_of_the_process(tmp_path: Path) -> None:
    """Also when the process ends right after the last event."""
    path = tmp_path / "log.jsonl"
    code = f"""
import structlog
from async_eplb.events.json_log import configure_json_logging
configure_json_logging({str(path)!r})
for number in range(5000):
    structlog.get_logger().info("eplb.some.event", number=number)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [line["number"] for line in lines(path)] == list(range(5000))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_survived_and_what_is_lost_is_counted() -> None:
    """The device that never has room."""
    with JsonLog("/dev/full") as log:
        for step in range(10):
            emit(log.logger(), event(step))
    assert log.num_dropped == 10


def test_what_was_lost_is_reported_when_there_is_room_again(tmp_path: Path) -> None:
    """A partial line is ended, so that the next one is whole."""
    script = ["all", "part", "nothing"]
    begun, gate, failed = threading.Event(), threading.Event(), threading.Event()

    def write(file: int, data: bytes) -> int:
        begun.set()
        assert gate.wait(10)
        what = script.pop(0) if script else "all"
        if what == "nothing":
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(file, data[:20] if what == "part" else data)

    with JsonLog(tmp_path / "log.jsonl", write=write) as log:
        logger = log.logger().bind(run_id="some run")
        emit(logger, event(0))
        assert begun.wait(10)
        emit(logger, event(1))
        emit(logger, event(2))
        gate.set()
        assert failed.wait(10)
        emit(logger, event(3))
    first, torn, dropped, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["step"] == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(torn)
    assert json.loads(dropped) == DROPPED
    assert json.loads(last)["step"] == 3
    assert log.num_dropped == 2


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_disk_that_hangs_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """Events above the limit are dropped and counted; the loop goes on."""
    hanging, release = threading.Event(), threading.Event()

    def write(file: int, data: bytes) -> int:
        hanging.set()
        release.wait(10)
        return os.write(file, data)

    log = JsonLog(tmp_path / "log.jsonl", max_waiting=3, write=write)
    emit(log.logger(), event(0))
    await anyio.to_thread.run_sync(hanging.wait, 10)
    for step in range(1, 6):
        emit(log.logger(), event(step))
    assert log.num_dropped == 2
    release.set()
    await anyio.to_thread.run_sync(log.close)
    written = await anyio.to_thread.run_sync(lines, tmp_path / "log.jsonl")
    assert [line["step"] for line in written if line["event"] != DROPPED["event"]] == [0, 1, 2, 3]
    assert [line["num_events"] for line in written if line["event"] == DROPPED["event"]] == [2]


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """Before anything is configured."""
    for path, level in ((tmp_path, "info"), (tmp_path / "log.jsonl", "loud")):
        with pytest.raises(InvalidOptions):
            configure_json_logging(path, level=level)
    assert not structlog.is_configured()


def test_events_after_the_end_are_counted(tmp_path: Path) -> None:
    """They raise nothing where weights are being moved."""
    log = JsonLog(tmp_path / "log.jsonl")
    log.close()
    emit(log.logger(), event(0))
    assert log.num_dropped == 1
