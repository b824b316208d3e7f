"""Pictures, traces and the page: drawn from real runs, and opened by those that they are for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.logs import NUM_LAYERS, SERVING, log_of_serving

from async_eplb.cli import main
from async_eplb.errors import InvalidOptions
from async_eplb.events.stages import FENCE, STAGES
from async_eplb.report import read_events
from async_eplb.report.intervals import pick_update, stage_intervals, updates_of
from async_eplb.report.runs import runs_of
from async_eplb.report.trace import trace_events

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log two updates of four ranks that serve."""
    return log_of_serving(tmp_path_factory.mktemp("serving"))


def browse(what: str, file: Path, folder: Path) -> dict[str, Any]:
    """Open a file in a browser and return what was seen."""
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "browse.py"), what, str(file), str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    seen: dict[str, Any] = json.loads(output)
    return seen


@pytest.mark.parametrize("name", ["timeline", "matrix"])
@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures_are_drawn(name: str, suffix: str, start: bytes, serving: Path, tmp_path: Path) -> None:
    """In the format that the file's name says, of the last update or a given one."""
    sizes = []
    for update in ([], ["--update", "1"]):
        path = tmp_path / f"{name}{len(update)}.{suffix}"
        assert main(["report", str(serving), f"--{name}", str(path), *update]) == 0
        assert path.read_bytes().startswith(start)
        sizes.append(len(path.read_bytes()))
    assert sizes[0] != sizes[1]


def test_a_timeline_holds_every_interval_in_its_colour(serving: Path, tmp_path: Path) -> None:
    """One shape for each layer, rank and stage."""
    path = tmp_path / "timeline.svg"
    main(["report", str(serving), "--timeline", str(path), "--update", "2"])
    text = path.read_text()
    for stage in STAGES:
        assert text.count(f"fill: {stage.colour}") >= SERVING.num_ranks * NUM_LAYERS


@pytest.mark.parametrize(
    "arguments", [["--timeline", "t.bmp"], ["--matrix", "m"], ["--timeline", "t.png", "--update", "9"]]
)
def test_what_cannot_be_drawn_is_refused(arguments: list[str], serving: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    options = [str(tmp_path / each) if each[0] in "tm" else each for each in arguments]
    assert main(["report", str(serving), *options]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--timeline", "t.png"], ["--matrix", "m.png"]])
def test_a_missing_package_is_named_with_its_extra(
    arguments: list[str], serving: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and status 2."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(serving), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'async-eplb[report]'" in line


def test_a_picture_that_cannot_be_written_is_refused(serving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each kind, and status 2."""
    for kind, name in (("timeline", "t.png"), ("matrix", "m.svg"), ("trace", "t.json"), ("html", "r.html")):
        assert main(["report", str(serving), f"--{kind}", f"/nowhere/{name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"/nowhere/{name} cannot be written" in line


def test_a_log_without_transfers_has_nothing_to_draw(serving: Path) -> None:
    """It says so."""
    log = read_events(str(serving))
    with pytest.raises(InvalidOptions, match="no update 3"):
        pick_update(runs_of(log), 3)


def trace_of(serving: Path) -> list[dict[str, Any]]:
    return list(trace_events(list(updates_of(runs_of(read_events(str(serving)))))))


def test_a_trace_has_the_keys_of_its_format(serving: Path) -> None:
    """Every event a phase, process and thread; slices times in microseconds; tracks that no other process has."""
    needed = {
        "M": {"name", "args"},
        "X": {"name", "cat", "ts", "dur", "args"},
        "b": {"name", "cat", "ts", "id2"},
        "e": {"name", "cat", "ts", "id2"},
        "s": {"name", "cat", "ts", "id"},
        "f": {"name", "cat", "ts", "id", "bp"},
    }
    owners: dict[int, int] = {}
    for event in trace_of(serving):
        assert needed[event["ph"]] | {"pid", "tid"} <= set(event)
        assert owners.setdefault(event["tid"], event["pid"]) == event["pid"]
        assert event.get("ts", 0.0) >= 0
        assert event.get("dur", 0.0) >= 0


def test_slices_of_a_track_do_not_overlap(serving: Path) -> None:
    """A reader would drop them."""
    ends: dict[int, float] = {}
    for event in sorted((e for e in trace_of(serving) if e["ph"] == "X"), key=lambda e: e["ts"]):
        assert event["ts"] >= ends.get(event["tid"], 0.0)
        ends[event["tid"]] = round(event["ts"] + event["dur"], 3)


def test_flows_lead_from_the_sender_to_the_receiver(serving: Path) -> None:
    """One arrow for each receive of each layer, both ends inside the transfer of that layer on its rank."""
    events = trace_of(serving)
    slices = {
        (e["pid"] - 1, e["args"]["update"], e["args"]["layer"]): e
        for e in events
        if e["ph"] == "X" and e["cat"] == "transfer"
    }
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    (run,) = runs_of(read_events(str(serving)))
    assert starts.keys() == ends.keys()
    assert len(starts) == len(run.links("received")["rank"])
    for number, start in starts.items():
        end = ends[number]
        assert (start["pid"] - 1, end["pid"] - 1) == (start["args"]["from"], start["args"]["to"])
        for arrow in (start, end):
            inside = [
                slice_
                for (rank, _, layer), slice_ in slices.items()
                if (rank, layer) == (arrow["pid"] - 1, arrow["args"]["layer"])
                and slice_["ts"] <= arrow["ts"] <= slice_["ts"] + slice_["dur"] + 1e-3
            ]
            assert inside
        assert start["ts"] <= end["ts"]


@needs_chromium
def test_a_trace_is_loaded_by_perfetto(serving: Path, tmp_path: Path) -> None:
    """Its own user interface finds every slice, wait and flow, each rank as a process, and nothing wrong."""
    file = tmp_path / "trace.json"
    assert main(["report", str(serving), "--trace", str(file)]) == 0
    seen = browse("trace", file, tmp_path)
    (run,) = runs_of(read_events(str(serving)))
    fences = sum(len(stage_intervals(run, generation)[FENCE.name]) for generation in (1, 2))
    number = 2 * SERVING.num_ranks * NUM_LAYERS
    expected = {"plan": number, "transfer": number, "commit": number, "fence": fences}
    assert {name: int(count) for name, count in seen["slices"]} == {k: v for k, v in expected.items() if v}
    assert sum(int(count) for _, count in seen["waits"]) == number
    assert sum(int(count) for *_, count in seen["flows"]) == len(run.links("received")["rank"])
    assert all(sender == receiver for sender, receiver, _ in seen["flows"])
    assert [name for name, _ in seen["processes"]] == [f"rank {rank} (node {rank // 2})" for rank in range(4)]
    assert seen["errors"] == []


@needs_chromium
def test_the_page_works_in_a_browser(serving: Path, tmp_path: Path) -> None:
    """No errors and nothing fetched; drawn, sorted, filtered, zoomed, moved; nothing wider than desk or phone."""
    file = tmp_path / "report.html"
    assert main(["report", str(serving), "--html", str(file)]) == 0
    seen = browse("page", file, tmp_path)
    assert seen["problems"] == []
    for stage in STAGES:
        assert seen["colours"].get(stage.colour, 0) > 50, stage
    cards = {label: value for label, value, *_ in seen["cards"]}
    assert (cards["outcome"], cards["layers"], cards["balancedness"]) == ("finished", "3 moved", "0.50 → 0.88")
    assert seen["layers_ascending"] == [0, 1, 2] == seen["layers_descending"][::-1]
    assert seen["sorted"] == "ascending"
    assert 1 in seen["filtered"]
    spans = {name: [float(part) for part in seen[name].split(",")] for name in ("all", "zoomed", "wheeled", "dragged")}
    lengths = {name: end - start for name, (start, end) in spans.items()}
    assert lengths["zoomed"] == pytest.approx(lengths["all"] / 2, rel=1e-3)
    assert lengths["wheeled"] == pytest.approx(lengths["zoomed"] * 0.8, rel=1e-3)
    assert spans["dragged"][0] > spans["wheeled"][0]
    assert lengths["dragged"] == pytest.approx(lengths["wheeled"], rel=1e-3)
    assert seen["back"] == seen["all"]
    assert (seen["width"], seen["phone_width"]) == (1280, 390)
    assert seen["smallest_font_px"] >= 12


def test_the_page_is_whole_and_holds_foreign_text_as_text(serving: Path, tmp_path: Path) -> None:
    """No address is fetched, and what a log says cannot end the script that holds it."""
    for path in serving.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace('"error": ""', '"error": "</script><b>"'))
    line = json.loads((tmp_path / "rank-0.jsonl").read_text().splitlines()[-1])
    line |= {"event": "eplb.update.failed", "duration_ms": 1.0, "error": "</script>", "error_message": "<b>"}
    with (tmp_path / "rank-0.jsonl").open("a") as file:
        file.write(json.dumps({**line, "committed_layers": []}) + "\n")
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("</script>") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
