"""Lines of logs from files, folders, globs, gzip and standard input."""

import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import BinaryIO

from async_eplb.errors import UnreadableLog

STANDARD_INPUT = "-"

_GZIP_MAGIC = b"\x1f\x8b"


def find_logs(names: Iterable[str]) -> list[str]:
    """Return the files of all names, each once: files, folders of ``*.jsonl`` and ``*.jsonl.gz``, globs, ``-``.

    :raises UnreadableLog: if there is no file for a name
    """
    found: dict[str, None] = {}
    for name in names:
        try:
            here = _files_of(name)
        except (OSError, ValueError) as error:  # too long, or with a null byte
            raise UnreadableLog(f"{name[:80]!r} is no name of a log: {error}", path=name) from error
        if not here:
            raise UnreadableLog(f"{name}: there is no such log", path=name)
        found.update(dict.fromkeys(here))
    return list(found)


def _files_of(name: str) -> list[str]:
    path = Path(name)
    if name == STANDARD_INPUT or path.is_file() or path.is_fifo():
        return [name]
    if path.is_dir():
        return sorted(str(each) for pattern in ("*.jsonl", "*.jsonl.gz") for each in path.glob(pattern))
    return sorted(each for each in glob(name, recursive=True) if Path(each).is_file())  # noqa: PTH207 - absolute ones too


def read_lines(name: str) -> Iterator[bytes]:
    """Yield the lines of one log, decompressed. A truncated gzip file yields its readable part.

    :raises UnreadableLog: if it cannot be opened or read
    """
    try:
        if name == STANDARD_INPUT:
            yield from _decompressed(sys.stdin.buffer)
        else:
            with Path(name).open("rb") as file:
                yield from _decompressed(file)
    except OSError as error:
        raise UnreadableLog(f"{name} cannot be read: {error.strerror or error}", path=name) from error


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    peek = getattr(file, "peek", None)
    if peek is None or peek(2)[:2] != _GZIP_MAGIC:
        yield from file
        return
    with gzip.open(file) as unpacked:
        try:
            yield from unpacked
        except (EOFError, zlib.error):
            yield b'"eplb.'  # is counted as a line that is cut off
