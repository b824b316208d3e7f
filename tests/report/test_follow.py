"""The live view: what is appended is shown, by whole lines, and memory does not grow with time."""

import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.logs import log_of_serving

from async_eplb.cli import main
from async_eplb.cli.follow import view
from async_eplb.report.live import MAX_UPDATES, LiveState, Tail


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Log two updates; all lines in the order of their times."""
    folder = log_of_serving(tmp_path_factory.mktemp("log"))
    events = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
    return [json.dumps(event).encode() for event in sorted(events, key=lambda event: event["monotonic_s"])]


def shown(state: LiveState) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view(state))
    return console.export_text()


def test_the_view_follows_updates_and_ranks(lines: list[bytes]) -> None:
    """Before the first event, in the middle and at the end."""
    state = LiveState()
    assert "waiting for an update" in shown(state)
    (middle, *_) = (n for n, line in enumerate(lines) if b"layer.committed" in line and b'"generation": 2' in line)
    state.take(lines[:middle])
    assert [update.outcome for update in state.updates.values()] == ["finished", "running"]
    assert "0/3" in shown(state)
    state.take(lines[middle:])
    assert [update.outcome for update in state.updates.values()] == ["finished", "finished"]
    text = shown(state)
    assert text.count("3/3") == 2
    assert "balancedness 0.5 before, 0.875 after" in text


def test_what_is_no_event_is_counted(lines: list[bytes]) -> None:
    """And breaks nothing."""
    state = LiveState()
    state.take([b"hello", b"[1]", b'{"event": 3}', b'{"event": "eplb.layer.planned", "schema_version": 1}', *lines])
    assert (state.num_left_out, state.num_events) == (4, len(lines))


def test_only_the_last_updates_are_remembered(lines: list[bytes]) -> None:
    """However many there are."""
    state = LiveState()
    for generation in range(1, 40):
        state.take(line.replace(b'"generation": 1,', b'"generation": %d,' % generation) for line in lines)
    assert len(state.updates) == MAX_UPDATES


def test_a_tail_returns_whole_lines_once(tmp_path: Path) -> None:
    """A half-written line comes when it is whole; a file that was replaced or emptied is read from its beginning."""
    path, tail = tmp_path / "log", Tail()
    assert tail.new_lines([str(path)]) == []
    path.write_bytes(b"one\ntw")
    assert tail.new_lines([str(path)]) == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert tail.new_lines([str(path)]) == [b"two", b"three"]
    assert tail.new_lines([str(path)]) == []
    (tmp_path / "next").write_bytes(b"four and more of it than before\n")
    (tmp_path / "next").replace(path)
    assert tail.new_lines([str(path)]) == [b"four and more of it than before"]
    path.write_bytes(b"five\n")
    assert tail.new_lines([str(path)]) == [b"five"]


def test_standard_input_cannot_be_followed(capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused in one line."""
    assert main(["report", "-", "--follow"]) == 2
    assert "not standard input" in capsys.readouterr().err


def test_a_terminal_shows_a_log_as_it_is_written(lines: list[bytes], tmp_path: Path) -> None:
    """A real process in a real terminal, ended by Ctrl-C with status 0."""
    log = tmp_path / "rank.jsonl"
    log.write_bytes(b"")
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "async_eplb", "report", str(tmp_path), "--follow"]
    environment = {**os.environ, "COLUMNS": "120", "LINES": "50", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    try:
        seen = _read_until(terminal, b"waiting for an update")
        with log.open("ab") as file:
            file.write(b"\n".join(lines) + b"\n")
        seen = _read_until(terminal, b"after the last rebalance")
        assert b"finished" in seen
        process.send_signal(signal.SIGINT)
        _read_to_the_end(terminal)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _read_until(terminal: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 20
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen


def _read_to_the_end(terminal: int) -> None:
    """Take what a process writes until it ends: one whose terminal nobody reads waits for that in its last write."""
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        _read_until(terminal, b"never written")
