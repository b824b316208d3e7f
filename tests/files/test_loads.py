"""Loads in files: those of this package come back equal, those of engines are read as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from async_eplb import ExpertLoad
from async_eplb.errors import InvalidLoad

TOKENS = st.tuples(st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: (
        arrays(np.int64, shape, elements=st.integers(0, 2**53))
        | arrays(np.float64, shape, elements=st.floats(0, 2**53, allow_subnormal=True))
    )
)


@settings(max_examples=50, deadline=None)
@given(TOKENS, st.integers(1, 2**40), st.sampled_from([None, "prefill", "decode"]), st.sampled_from([".json", ".npz"]))
def test_a_saved_load_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, tokens: Any, num_steps: int, phase: str | None, suffix: str
) -> None:
    """Numbers to the last bit, their type, steps and phase; either format, under any case of its name."""
    load = ExpertLoad.from_counts(tokens, num_steps=num_steps, phase=phase)
    path = tmp_path_factory.mktemp("loads") / "load"
    for name in (suffix, suffix.upper()):
        load.save(path.with_suffix(name))
        read = ExpertLoad.load(path.with_suffix(name))
        assert read == load
        assert read.tokens.dtype == load.tokens.dtype


def test_a_saved_load_says_what_it_is(tmp_path: Path) -> None:
    """A version, and the axes with a place for stages."""
    ExpertLoad.from_counts([[1, 2], [3, 4]], num_steps=5, phase="decode").save(tmp_path / "load.json")
    assert json.loads((tmp_path / "load.json").read_text()) == {
        "version": 1,
        "axes": ["stages", "layers", "experts"],
        "num_steps": [5],
        "phase": "decode",
        "tokens": [[[1, 2], [3, 4]]],
    }


OWN = {"version": 1, "axes": ["stages", "layers", "experts"], "num_steps": [5], "phase": "", "tokens": [[[1, 2]]]}


def test_stages_are_added_up() -> None:
    """Files with several are read already."""
    load = ExpertLoad.load(json.dumps(OWN | {"num_steps": [5, 2], "tokens": [[[1, 2]], [[30, 40]]]}))
    assert load == ExpertLoad.from_counts([[31, 42]], num_steps=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, and this package reads versions up to 1"),
        ({"version": 0}, "version 0"),
        ({"version": True}, "version True"),
        ({"axes": ["layers", "experts"]}, "axes are"),
        ({"axes": ["stages", "experts", "layers"]}, "axes are"),
        ({"tokens": [[1, 2]]}, "tokens is"),
        ({"tokens": [[["a"]]]}, "tokens is"),
        ({"tokens": [[[-1, 2]]]}, "-1 tokens"),
        ({"tokens": [[[-1, 2]], [[5, 5]]], "num_steps": [1, 1]}, "-1 tokens"),
        ({"num_steps": 5}, "num_steps is"),
        ({"num_steps": [0]}, "num_steps is"),
        ({"num_steps": [1, 1]}, "num_steps is"),
        ({"num_steps": [1.5]}, "num_steps holds"),
        ({"phase": 3}, "phase is 3"),
    ],
)
def test_a_file_of_ours_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    """By what is wrong with it; a later version is named."""
    with pytest.raises(InvalidLoad, match=message):
        ExpertLoad.load(json.dumps(OWN | changes))


def test_other_endings_are_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(InvalidLoad, match=r"saved as \.json or \.npz"):
        ExpertLoad.from_counts([[1]]).save(tmp_path / "load.pt")
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_only_steps_that_were_used_count(size: int, data: st.DataObject) -> None:
    """A recorder's buffer has room for more."""
    used = data.draw(st.sets(st.integers(0, size - 1)))
    counts = np.zeros((size, 2, 3), dtype=np.int32)
    counts[sorted(used), 1, 2] = 4
    load = ExpertLoad.from_counts(counts)
    assert load.num_steps == max(1, len(used))
    assert load.tokens.sum() == 4 * len(used)


def test_a_dump_of_sglang_in_the_mode_stat(tmp_path: Path) -> None:
    """1,000 steps of which 10 were used; other keys beside."""
    counts = torch.zeros(1000, 2, 4, dtype=torch.int32)
    counts[:10] = torch.arange(8, dtype=torch.int32).view(2, 4)
    dump = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    torch.save(dump, tmp_path / "expert_distribution_recorder_1.5.pt")
    load = ExpertLoad.load(tmp_path / "expert_distribution_recorder_1.5.pt")
    assert load.num_steps == 10
    assert load.tokens_per_step().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


MAP = torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]], dtype=torch.int32)


def record(number: int, rank: int, counts: list[list[int]], **others: Any) -> dict[str, Any]:
    """Return a record of one pass of one rank."""
    about = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
    return {**about, "global_physical_count": torch.tensor(counts, dtype=torch.int32), **others}


def per_pass(*records: dict[str, Any], last: torch.Tensor = MAP) -> dict[str, Any]:
    """Return a dump of one rank in the modes ``per_pass`` or ``per_token``."""
    return {"records": list(records), "last_physical_to_logical_map": last}


FIRST = [[1, 2, 3, 4], [5, 6, 7, 8]]
SECOND = [[10, 0, 0, 0], [0, 0, 0, 10]]


def test_a_dump_of_sglang_in_the_mode_per_pass(tmp_path: Path) -> None:
    """Physical counts are folded with the map that the dump ends with; what else is in a record does not matter."""
    tokens = {"input_ids": [1, 2], "topk_ids_of_layer": torch.zeros(2, 2, 8), "misc_objects": [{"a": [1]}]}
    torch.save(per_pass(record(7, 0, FIRST), record(9, 0, SECOND, **tokens)), tmp_path / "dump_0.pt")
    load = ExpertLoad.load(tmp_path / "dump_0.pt")
    assert load == ExpertLoad.from_counts([[1 + 10, 5, 4], [15 + 10, 6, 5]], num_steps=2)


def test_a_folder_of_dumps_has_the_counts_of_all_ranks(tmp_path: Path) -> None:
    """Passes of several ranks are the same passes."""
    for rank in (0, 1):
        torch.save(per_pass(record(7, rank, FIRST), record(9, rank, SECOND)), tmp_path / f"dump_{rank}.pt")
    (tmp_path / "notes.txt").write_text("of another kind")
    load = ExpertLoad.load(tmp_path)
    assert load == ExpertLoad.from_counts([[22, 10, 8], [50, 12, 10]], num_steps=2)


DUMPS: dict[str, tuple[Callable[[], list[dict[str, Any]]], str]] = {
    "none": (list, "without dumps"),
    "the same twice": (
        lambda: [per_pass(record(7, 0, FIRST)), per_pass(record(7, 0, FIRST))],
        "pass 7 of rank 0 twice",
    ),
    "other maps": (lambda: [per_pass(record(7, 0, FIRST)), per_pass(last=MAP.flip(0))], "different maps"),
    "another kind": (lambda: [per_pass(record(7, 0, FIRST)), {"logical_count": MAP}], "no 'last_physical"),
    "no passes": (lambda: [per_pass()], "has no pass"),
    "other slots": (lambda: [per_pass(record(7, 0, [[1, 2], [3, 4]]))], r"are \[2, 2\], the map \[2, 4\]"),
    "experts beyond": (lambda: [per_pass(record(7, 0, FIRST), last=MAP + 9)], "no logical experts of 4 slots"),
    "a count of text": (lambda: [per_pass({**record(7, 0, FIRST), "global_physical_count": "a"})], "must be numbers"),
    "a record of text": (lambda: [{**per_pass(), "records": ["a"]}], "where an object with"),
    "floats": (lambda: [per_pass({**record(7, 0, FIRST), "global_physical_count": MAP / 2})], "must hold integers"),
}


@pytest.mark.parametrize(("dumps", "message"), DUMPS.values(), ids=DUMPS)
def test_dumps_that_do_not_fit_are_refused(
    tmp_path: Path, dumps: Callable[[], list[dict[str, Any]]], message: str
) -> None:
    """By what is wrong with them."""
    for number, dump in enumerate(dumps()):
        torch.save(dump, tmp_path / f"{number}.pt")
    with pytest.raises(InvalidLoad, match=message):
        ExpertLoad.load(tmp_path)


def statistics(**changes: Any) -> dict[str, Any]:
    """Return a line of vLLM's statistics."""
    line = {"record_type": "eplb_load_stats", "version": 1, "step": 7, "num_ranks": 2}
    return {**line, "expert_load": [[10, 1, 5, 2], [2, 8, 1, 3]], "p2l_map": [[0, 1, 2, 0], [2, 1, 0, 0]], **changes}


def test_statistics_of_vllm(tmp_path: Path) -> None:
    """Lines with physical counts and the map of their pass; lines about the run are left out."""
    moved = statistics(expert_load=[[1, 1, 1, 1], [1, 1, 1, 0]], p2l_map=[[1, 2, 0, 1], [0, 1, 2, 0]])
    lines = [{"record_type": "eplb_load_meta", "version": 1, "num_layers": 2}, statistics(), moved]
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    expected = ExpertLoad.from_counts([[12 + 1, 1 + 2, 5 + 1], [4 + 1, 8 + 1, 2 + 1]], num_steps=2)
    assert ExpertLoad.load(tmp_path / "stats.jsonl") == expected


@pytest.mark.parametrize(
    "lines", [[{"a": 1}, {"b": 1}], [statistics(p2l_map=[[0, 1]])], [statistics(), 3, statistics(expert_load=[[1]])]]
)
def test_statistics_that_make_no_sense_are_refused(tmp_path: Path, lines: list[object]) -> None:
    """Without a count, or with a map of another shape."""
    (tmp_path / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InvalidLoad):
        ExpertLoad.load(tmp_path / "stats.jsonl")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".json"])
def test_a_table_alone(tmp_path: Path, suffix: str) -> None:
    """DeepSeek's weights, and windows of vLLM: of a step, or of several."""
    counts = [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[5, 5], [5, 5]]]
    path = tmp_path / f"weight{suffix}"
    for table, expected in ((counts[0], (counts[0], 1)), (counts, ([[6, 7], [8, 9]], 2))):
        if suffix == ".json":
            path.write_text(json.dumps(table))
        else:
            torch.save(torch.tensor(table, dtype=torch.float32), path)
        load = ExpertLoad.load(path)
        assert (load.tokens.tolist(), load.num_steps) == expected
