"""JSON lines: all of them, on time, and counted where the disk takes none."""

import errno
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
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
    assert log.num_dropped_by_reason == {"[Errno 28] No space left on device": 10}


def test_what_was_lost_is_reported_when_there_is_room_again(tmp_path: Path) -> None:
    """A partial line is ended, so that the next one is whole."""
    script = ["all", "part", "nothing", "nothing"]
    begun, gate, failed = threading.Event(), threading.Event(), threading.Event()

    def write(file: int, data: bytes) -> int:
        begun.set()
        assert gate.wait(10)
        what = script.pop(0) if script else "all"
        if what == "nothing":
            if not script:
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
    assert log.num_dropped_by_reason == {"[Errno 28] No space left on device": 2}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_disk_that_hangs_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """Events above the limit are dropped and counted; the loop goes on."""
    hanging, release = threading.Event(), threading.Event()

    def write(file: int, data: bytes) -> int:
        hanging.set()
        release.wait(10)
        return os.write(file, data)

    log = await anyio.to_thread.run_sync(partial(JsonLog, tmp_path / "log.jsonl", max_waiting=3, write=write))
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
    (tmp_path / "file").touch()
    bad = (tmp_path, tmp_path / "file" / "log.jsonl", "null\0byte", None)
    for path, level in (*((path, "info") for path in bad), (tmp_path / "log.jsonl", "loud")):
        with pytest.raises(InvalidOptions):
            configure_json_logging(path, level=level)  # type: ignore[arg-type]
    assert not structlog.is_configured()


def test_events_after_the_end_are_counted(tmp_path: Path) -> None:
    """They raise nothing where weights are being moved."""
    log = JsonLog(tmp_path / "log.jsonl")
    log.close()
    log.close()
    emit(log.logger(), event(0))
    assert log.num_dropped_by_reason == {"the log is closed": 1}


class Ends:
    """Ends the thread that shows it."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __repr__(self) -> str:
        raise self._error


@pytest.mark.parametrize("error", [RuntimeError(), RecursionError(), queue.Empty()], ids=repr)
def test_a_value_that_cannot_be_shown_costs_no_line(error: Exception, tmp_path: Path) -> None:
    """Its line says so, and the others are written."""
    with JsonLog(tmp_path / "log.jsonl") as log:
        emit(log.logger().bind(odd=Ends(error)), event(0))
        emit(log.logger(), event(1))
    first, second = lines(tmp_path / "log.jsonl")
    assert (first["step"], first["odd"], second["step"]) == (0, "<Ends that cannot be shown>", 1)
    assert log.num_dropped == 0


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_nothing_that_a_value_raises_ends_the_writer(error: BaseException, tmp_path: Path) -> None:
    """The event is counted, a line tells of it, and the others are written."""
    with JsonLog(tmp_path / "log.jsonl") as log:
        log.logger().info("eplb.some.event", generation=Ends(error), run_id=Ends(error))
        emit(log.logger(), event(1))
    dropped, second = lines(tmp_path / "log.jsonl")
    assert (dropped["event"], dropped["num_events"], second["step"]) == (DROPPED["event"], 1, 1)
    assert log.num_dropped_by_reason == {type(error).__name__: 1}


def test_what_was_dropped_is_told_when_the_log_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To standard logging."""

    def write(_file: int, _data: bytes) -> int:
        raise OSError(errno.EIO, "gone")

    with JsonLog(tmp_path / "log.jsonl", write=write) as log:
        emit(log.logger(), event(0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 events were dropped: {'[Errno 5] gone': 1}" in caplog.text


def rename(path: Path) -> None:
    path.rename(path.with_suffix(".1"))


def unlink_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def truncate(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("rotate", [rename, Path.unlink, unlink_folder, truncate])
def test_after_a_rotation_lines_are_in_a_new_file(rotate: Callable[[Path], None], tmp_path: Path) -> None:
    """Under the name that it was opened with, in a folder that is made if need be."""
    path, written = tmp_path / "logs" / "deep" / "log.jsonl", threading.Event()

    def write(file: int, data: bytes) -> int:
        done = os.write(file, data)
        written.set()
        return done

    with JsonLog(path, write=write) as log:
        emit(log.logger(), event(0))
        assert written.wait(10)
        rotate(path)
        emit(log.logger(), event(1))
    assert [line["step"] for line in lines(path)] == [1]
    assert log.num_dropped == 0


def test_a_file_that_somebody_closed_is_opened_anew(tmp_path: Path) -> None:
    """As by a program that closes all its files to become a daemon: one line is lost, and counted."""
    calls = count()

    def write(file: int, data: bytes) -> int:
        if next(calls) == 0:
            os.close(file)
        return os.write(file, data)

    with JsonLog(tmp_path / "log.jsonl", write=write) as log:
        for step in range(3):
            emit(log.logger(), event(step))
    dropped, *others = lines(tmp_path / "log.jsonl")
    assert (dropped["event"], dropped["num_events"]) == (DROPPED["event"], 1)
    assert [line["step"] for line in others] == [1, 2]


def test_a_forked_child_writes_its_lines(tmp_path: Path) -> None:
    """Even one that ends without a goodbye; what waited in the parent is written once."""
    path = tmp_path / "log.jsonl"
    code = f"""
import os, structlog
from async_eplb.events.json_log import configure_json_logging
with configure_json_logging({str(path)!r}) as log:
    for number in range(200):
        structlog.get_logger().info("eplb.of.parent", number=number)
        if number % 50 == 0 and os.fork() == 0:
            structlog.get_logger().info("eplb.of.child", number=number)
            if number == 100:
                log.close()
                structlog.get_logger().info("not structlog's any more")
            os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
    written = lines(path)
    assert [line["number"] for line in written if line["event"] == "eplb.of.parent"] == list(range(200))
    assert {line["number"] for line in written if line["event"] == "eplb.of.child"} == {0, 50, 100, 150}


def test_a_process_ends_though_the_disk_hangs(tmp_path: Path) -> None:
    """After a second; what is lost is told to standard logging."""
    code = f"""
import logging, threading
from async_eplb.events.json_log import JsonLog
logging.basicConfig()
logger = JsonLog({str(tmp_path / "log.jsonl")!r}, write=lambda file, data: threading.Event().wait()).logger()
for number in range(3):
    logger.info("eplb.some.event", number=number)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE, timeout=60)
    assert b"3 events were dropped: {'the disk did not answer': 3}" in done.stderr
