"""Logs as they come: cut off, mixed with others, of other versions, packed. A report says what it left out."""

import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from support.logs import log_of_serving

from async_eplb.cli import main
from async_eplb.errors import UnreadableLog
from async_eplb.report import Report, read_events, reading, summarize


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log one update in a file for each rank."""
    return log_of_serving(tmp_path_factory.mktemp("log"), num_updates=1)


@pytest.fixture
def lines(log: Path) -> list[str]:
    """All events, in one list."""
    return [line for path in sorted(log.iterdir()) for line in path.read_text().splitlines(keepends=True)]


def report_of(path: Path | str) -> Report:
    return summarize(read_events(str(path)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Traceback (most recent call last):", "of other programs"),
        ('{"level": "info", "event": "request done"}', "of other programs"),
        ('{"message": "see \\"eplb.layer.planned\\""}', "of other programs"),
        ('{"event": "eplb.layer.planned", "schema_version": 1, "rank"', "no JSON"),
        ('["eplb.layer.planned"]', "not an event"),
        ('"eplb.layer.planned"', "not an event"),
        ("[" * 100_000 + '"eplb.', "no JSON"),
        ('{"event": "eplb.layer.planned"}', "without schema_version"),
        ('{"event": "eplb.layer.planned", "schema_version": 1, "run_id": "a"}', "without generation"),
        ('{"event": ["eplb.layer.planned"], "schema_version": 1}', "not an event"),
        ('{"event": "eplb.layer.planned", "schema_version": 7, "x": 1}', "of schema version 7; this is 1"),
        ('{"event": "eplb.cat.purred", "schema_version": 1}', "unknown event eplb.cat.purred"),
        ('{"event": "eplb.\ud800"}'.encode("utf-8", "surrogatepass").decode("latin-1"), "of other programs"),
    ],
)
def test_a_line_that_is_no_event_is_left_out(lines: list[str], line: str, reason: str, tmp_path: Path) -> None:
    """And counted; the report is that of the other lines."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join([*lines[:5], line + "\n", *lines[5:]]))
    report = report_of(path)
    (left_out,) = report.left_out
    assert left_out.startswith(f"{path}: 1 line left out: ")
    assert reason in left_out or (reason == "of other programs" and "without" in left_out)
    path.write_text("".join(lines))
    assert report.updates == report_of(path).updates


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", "three"),
        ("duration_ms", None),
        ("layer", 1.5),
        ("generation", True),
        ("nbytes", 10**30),
        ("rank", [1]),
        ("rank", -1),
        ("rank", 10**15),
        ("layer", 10**12),
        ("generation", -1),
    ],
)
def test_a_value_of_another_type_is_left_out(lines: list[str], key: str, value: object, tmp_path: Path) -> None:
    """Only that event."""
    (index, *_) = (number for number, line in enumerate(lines) if '"eplb.layer.committed"' in line)
    lines[index] = json.dumps({**json.loads(lines[index]), key: value}) + "\n"
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines))
    log = read_events(str(path))
    assert len(log.tables["eplb.layer.committed"]["rank"]) == sum("layer.committed" in line for line in lines) - 1
    assert [str(each) for each in log.left_out] == [
        "eplb.layer.committed: 1 line left out: a value that its key cannot have"
    ]
    summarize(log)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_logs_never_end_in_a_traceback(lines: list[str], seed: int, tmp_path: Path) -> None:
    """Cut, doubled, shuffled and overwritten at random: a report of what is left, or a typed error."""
    import random  # noqa: PLC0415

    rng = random.Random(seed)
    data = bytearray("".join(rng.sample(lines, rng.randrange(1, len(lines)))).encode())
    for _ in range(rng.randrange(30)):
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(40)] = rng.randbytes(rng.randrange(20))
    path = tmp_path / "log.jsonl"
    path.write_bytes(bytes(data))
    assert main(["report", str(path)]) in (0, 2)


def test_every_prefix_of_a_log_is_reported(log: Path, tmp_path: Path) -> None:
    """A rank is still writing: what is whole is read, and the last line is left out."""
    whole = (log / "rank-0.jsonl").read_bytes()
    path = tmp_path / "log.jsonl"
    for end in range(whole.index(b"\n") + 1, len(whole), 97):
        path.write_bytes(whole[:end])
        report = report_of(path)
        assert all("cut off" in reason for reason in report.left_out)
        assert report.updates == () or report.updates[0].outcome in ("unfinished", "finished")


def copied(log: Path, folder: Path) -> list[str]:
    """A copy under another name."""
    shutil.copytree(log, folder / "copy")
    return [str(log), str(folder / "copy")]


def linked(log: Path, folder: Path) -> list[str]:
    """A link to the folder."""
    (folder / "link").symlink_to(log)
    return [str(folder / "link"), str(log)]


def packed(log: Path, folder: Path) -> list[str]:
    """Packed files beside the others, as a rotation may leave them."""
    shutil.copytree(log, folder / "both")
    for path in log.iterdir():
        (folder / "both" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return [str(folder / "both")]


def spelled(log: Path, _folder: Path) -> list[str]:
    """The folder, and its files by other names."""
    return [str(log), f"{log}/../{log.name}/rank-*.jsonl"]


@pytest.mark.parametrize("twice", [copied, linked, packed, spelled])
def test_the_same_log_twice_is_counted_once_and_told(
    log: Path, lines: list[str], twice: Callable[[Path, Path], list[str]], tmp_path: Path
) -> None:
    """All figures are those of one."""
    once = read_events(str(log))
    both = read_events(*twice(log, tmp_path))
    num_events = sum(len(table["rank"]) for table in once.tables.values())
    assert [str(each) for each in both.left_out] == [
        f"all logs: {num_events} lines left out: of events that were read already"
    ]
    assert num_events == len(lines)
    assert replace(summarize(both), left_out=()) == summarize(once)
    assert {name: len(table["peer"]) for name, table in both.links.items()} == {
        name: len(table["peer"]) for name, table in once.links.items()
    }


def test_events_that_differ_in_one_value_are_two(lines: list[str], tmp_path: Path) -> None:
    """Though they have the same time, as on ranks of one host."""
    event = next(json.loads(line) for line in lines if '"eplb.layer.transferred"' in line)
    others = [{**event, key: event[key] + 1} for key in ("rank", "layer", "step", "copied_nbytes")]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [event, *others, event]))
    log = read_events(str(path))
    assert len(log.tables["eplb.layer.transferred"]["rank"]) == 5
    assert len(log.links["sent"]["peer"]) == 5 * len(event["sent_to_ranks"])
    assert [each.num_lines for each in log.left_out] == [1]


@pytest.mark.parametrize("with_orjson", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "is_read"),
    [
        ("bound", "NaN", True),
        ("bound", "[-Infinity]", True),
        ("bound", '"\\ud800"', True),
        ("bound", "1" + "0" * 400, True),
        ("bound", "1" + "0" * 5000, False),
        ("bound", "[" * 100_000, False),
        ("duration_ms", "NaN", False),
        ("duration_ms", "1e999", False),
        ("nbytes", "1" + "0" * 30, False),
        ("num_layers", "Infinity", True),
    ],
)
def test_lines_are_read_alike_with_and_without_orjson(
    key: str,
    value: str,
    *,
    is_read: bool,
    with_orjson: bool,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old logs hold numbers that are no JSON: only keys that the report needs must have good values."""
    assert reading.loads is orjson.loads
    if not with_orjson:
        monkeypatch.setattr(reading, "loads", json.loads)
    committed = next(json.loads(line) for line in lines if '"eplb.layer.committed"' in line)
    path = tmp_path / "log.jsonl"
    text = json.dumps({**committed, key: "VALUE"}).replace('"VALUE"', value)
    path.write_text(f"{text}\n{json.dumps({**committed, 'rank': 1})}\n")
    log = read_events(str(path))
    assert len(log.tables["eplb.layer.committed"]["rank"]) == 1 + is_read
    assert sum(each.num_lines for each in log.left_out) == 1 - is_read


def test_two_runs_in_one_file_are_two_runs(log: Path, tmp_path: Path) -> None:
    """Each with its update, though generations are equal."""
    other = log_of_serving(tmp_path / "other", num_updates=1)
    path = tmp_path / "both.jsonl"
    path.write_text("".join(each.read_text() for folder in (log, other) for each in sorted(folder.iterdir())))
    both = report_of(path).updates
    assert [update.generation for update in both] == [1, 1]
    assert both == (*report_of(log).updates, *report_of(other).updates)


def test_gzip_globs_folders_and_standard_input_are_read_alike(
    log: Path, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them hold the same update."""
    expected = report_of(log).updates
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in log.iterdir():
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert report_of(packed).updates == report_of(f"{log}/*.jsonl").updates == expected
    for data in ("".join(lines).encode(), gzip.compress("".join(lines).encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
        assert report_of("-").updates == expected


def test_a_gzip_file_that_ends_early_is_read_as_far_as_it_goes(lines: list[str], tmp_path: Path) -> None:
    """And says so."""
    packed = gzip.compress("".join(lines).encode())
    (tmp_path / "log.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    report = report_of(tmp_path)
    assert report.updates
    assert any("cut off" in reason for reason in report.left_out)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n\n",
        "hello\n",
        '{"event": "eplb.layer.planned"}\n',
        '{"event": "eplb.layer.planned", "schema_version": 1, "run_id": "a"}\n',
    ],
)
def test_a_log_without_events_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one line and status 2."""
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(UnreadableLog):
        read_events(str(path))
    assert main(["report", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("async_eplb: no event of async_eplb in ")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing file, a glob of nothing, an empty folder."""
    for name in ("missing", "*.jsonl", "."):
        with pytest.raises(UnreadableLog):
            read_events(str(tmp_path / name))
