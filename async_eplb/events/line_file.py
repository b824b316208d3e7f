"""A file of JSON lines behind a bounded queue, made of standard logging's handlers."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging import LogRecord
from logging.handlers import QueueHandler, QueueListener, WatchedFileHandler
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from async_eplb.events.emit import stamped
from async_eplb.events.plain import json_line, shown
from async_eplb.events.schema import LogDropped


class EventRecord(LogRecord):
    """A record with an event for its message, and nothing else: the rest would take longer to make than the event."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.msg = event


class Entry(QueueHandler):
    """Takes records from any thread and never waits. Counts what is lost, here and on the way to the file.

    Its lock, as that of any handler, is made anew in forked children.

    :param max_waiting: limit of records in the queue
    """

    def __init__(self, max_waiting: int) -> None:
        self.waiting: SimpleQueue[Any] = SimpleQueue()
        super().__init__(self.waiting)
        self.closed = False
        self.num_lost: Counter[str] = Counter()
        """Events that are in no line, by reason; it is empty for those that found the queue full."""
        self._max_waiting = max_waiting
        self._untold: tuple[Mapping[str, Any], int, str] | None = None
        """Losses that no line tells of: the first event, their number, and the last reason."""

    def prepare(self, record: LogRecord) -> LogRecord:
        """Leave the record as it is: the writer has the time to make it text."""
        return record

    def enqueue(self, record: LogRecord) -> None:
        """Queue a record, or count it as lost."""
        if self.closed:
            self.lose(record, "the log is closed")
        elif self.waiting.qsize() >= self._max_waiting:
            self.lose(record, "")
        else:
            self.waiting.put(record)

    def close_once(self) -> bool:
        """Take no more records; return whether some were taken before."""
        with self.locked():
            was_open, self.closed = not self.closed, True
        return was_open

    def lose(self, record: LogRecord, reason: str) -> None:
        """Count an event as lost."""
        with self.locked():
            self.num_lost[reason] += 1
            first, number, last_reason = self._untold or (_event_of(record), 0, "")
            self._untold = first, number + 1, reason or last_reason

    def tell(self, append: Callable[[bytes], None]) -> None:
        """Append a line about losses, if there are some that no line tells of."""
        if self._untold is None:
            return
        first, number, reason = self._untold
        facts = {key: first.get(key) for key in ("generation", "rank", "step")}
        about = {key: value if isinstance(value, int) else 0 for key, value in facts.items()}
        run_id = first.get("run_id") if isinstance(first.get("run_id"), str) else ""
        dropped = LogDropped(**about, num_events=number, error=reason)
        append(json_line({"event": dropped.name, "run_id": run_id, **stamped(dropped)}))
        with self.locked():
            first, number_now, reason = self._untold
            self._untold = (first, number_now - number, reason) if number_now > number else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads out."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


class LineFile(WatchedFileHandler):
    """A file of whole lines, opened anew if it was renamed or removed, or did not take a line.

    Lines go past the text stream, which would keep what a full disk has not taken, and write it later.

    :param entry: counts lines that cannot be written
    :param write: as ``os.write``
    :raises OSError: if the file cannot be opened
    """

    def __init__(self, path: str | os.PathLike[str], entry: Entry, write: Callable[[int, bytes], int]) -> None:
        self._entry = entry
        self._write = write
        self._torn = False
        super().__init__(path, encoding="ascii")

    def createLock(self) -> None:  # noqa: N802 - its name in standard logging
        """Have no lock: one thread writes, and the end of the process would wait for it while the disk hangs."""
        self.lock = None

    def emit(self, record: LogRecord) -> None:
        """Write a record's event, or count it as lost."""
        try:
            line = json_line(_event_of(record))
            self._entry.tell(self._append)
            self._append(line)
        except Exception as error:  # noqa: BLE001 - the disk, or the code of a value's class
            self._entry.lose(record, shown(error, str))
            self._let_go()

    def finish(self) -> None:
        """Write what is left to tell, and close the file."""
        with suppress(OSError):
            self._entry.tell(self._append)
        self._let_go()

    def _append(self, line: bytes) -> None:
        self.reopenIfNeeded()
        self.stream = self.stream or self._open()
        for data in (b"\n", line) if self._torn else (line,):
            left = data
            while left:
                left = left[self._write(self.stream.fileno(), left) :]
                self._torn = bool(left)

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def _let_go(self) -> None:
        with suppress(OSError):
            self.close()


class Writer(QueueListener):
    """The thread between queue and file, which ends only when told to."""

    def __init__(self, entry: Entry, file: LineFile) -> None:
        super().__init__(entry.waiting, file)
        self._entry = entry

    def handle(self, record: LogRecord | Event) -> None:
        """Write a record, or set an event: all before it is written."""
        if isinstance(record, Event):
            record.set()
            return
        try:
            super().handle(record)
        except BaseException as error:  # noqa: BLE001 - the code of a value's class may raise anything
            self._entry.lose(record, type(error).__name__)

    def finish(self, timeout_s: float | None) -> bool:
        """End the thread when all that waits is written; return whether it was in time."""
        written = Event()
        self._entry.waiting.put(written)
        if written.wait(timeout_s):
            self.stop()
        return written.is_set()


def _event_of(record: LogRecord) -> Mapping[str, Any]:
    event: Mapping[str, Any] = vars(record)["msg"]
    return event
