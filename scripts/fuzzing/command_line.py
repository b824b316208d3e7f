"""Run command lines in which options are parsed and checked, but no process is started and nothing is written."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from async_eplb.cli import demo, fuzz, main, report, simulate
from async_eplb.testing.sample_model import random_placement

_MOST_EXPERTS = 1 << 20

SEEDS = [
    line.replace(" ", "\n").encode()
    for line in (
        "demo --ranks 8 --experts 64 --layers 20 --nodes 4 --replicas 96 --seed 1",
        "demo --placement new.json --ranks 4 --backend gloo --log-dir logs",
        "events",
        "fuzz --seeds 1:10000 -j 2 --keep",
        "fuzz --scenario {}",
        "report log.jsonl --json --update 1 --html a.html",
        "report --compare log.jsonl log.jsonl --fail-if num_failed>0",
        "simulate --model kimi-k2 --cluster gb200 --ranks 72 144 --policy incremental --drift 0.3 --slots 8",
        "simulate --ranks 8 64 --layers 8 --plot scale.png --json scale.json --slowest 2 --nodes 2",
    )
]
WORDS = (*tuple({word for line in SEEDS for word in line.split(b"\n")}), b"\n", b"-1", b"nan", b"inf", b"1e999")

_PLACEMENT = '{"physical_to_logical_map": [[0, 1, 1, 0]], "num_logical_experts": 2}'


class _Reached(Exception):
    """Raised in place of the work that begins after all checks."""


def feed(data: bytes) -> None:
    """Run a command line whose paths are all inside this folder."""
    arguments = [line.replace("/", "_") for line in data.decode(errors="replace").split("\n")]
    Path("new.json").write_text(_PLACEMENT)
    Path("log.jsonl").write_text("hello\n")
    with _idle():
        try:
            status = main(arguments)
        except _Reached:
            return
        except SystemExit as end:
            status = 0 if end.code is None else int(end.code)
        assert status in (0, 2), f"exit status {status}"


@contextmanager
def _idle() -> Iterator[None]:
    """Replace all functions that begin to work by one that raises :class:`_Reached`."""

    def reached(*_arguments: Any, **_options: Any) -> Any:
        raise _Reached

    def place_few(rng: Any, layers: int, physical: int, experts: int) -> Any:
        return random_placement(rng, layers, physical, experts) if layers * physical < _MOST_EXPERTS else reached()

    with (
        Path(os.devnull).open() as nothing,
        patch.object(sys, "stdin", nothing),
        patch.object(demo, "World", reached),
        patch.object(demo, "_make", reached),
        patch.object(demo, "random_placement", place_few),
        patch.object(fuzz, "_tallies", reached),
        patch.object(fuzz, "simulate", reached),
        patch.object(report, "_draw", reached),
        patch.object(simulate, "compare_plans", reached),
    ):
        yield
