"""The README's code and output are current."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from textwrap import dedent

import pytest

import async_eplb
from async_eplb import Planner, UpdateOptions, errors
from async_eplb.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_as_printed(tmp_path: Path) -> None:
    """The code prints the output in its comment."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "quick_start.py"
    script.write_text(code)
    output = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    assert output == "[[2, 1], [0, 1]]\n"


def test_the_demo_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Line for line, but for times."""
    (shown,) = re.findall(r"^    12 experts.*?compared\)\.$", README, flags=re.DOTALL | re.MULTILINE)
    assert main(["demo", "--backend", "gloo"]) == 0
    assert _without_times(capsys.readouterr().out) == _without_times(dedent(shown))


def _without_times(output: str) -> list[str]:
    numbers = re.sub(r"\d+\.\d+(?= ms| \(stage)", "?", output)
    return numbers.splitlines()


def test_the_table_of_options_is_complete() -> None:
    """Each option and its default; what is None, False or a planner there is named in words."""
    section = re.split(r"^## ", README, flags=re.MULTILINE)[1:]
    (options,) = (each for each in section if each.startswith("Options of an update"))
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", options, flags=re.MULTILINE)
    table = {name: default for names, default in rows for name in re.findall(r"`(.*?)`", names)}
    words = {"None": "what fits", "False": "off", str(Planner()): "as engines plan"}
    defaults = {field.name: str(field.default).removesuffix(".0") for field in fields(UpdateOptions)}
    shown = {name: words.get(default, default) for name, default in defaults.items()}
    assert {name: default.strip('`"') for name, default in table.items()} == shown


def test_every_name_in_code_can_be_imported_from_the_package() -> None:
    """Or is an error: so that a piece of code can be copied, and its names found."""
    code = [*re.findall(r"`([^`\n]+)`", README), *re.findall(r"^    .*", README, flags=re.MULTILINE)]
    code = [re.sub(r"#.*|\".*?\"", "", line) for line in code]
    used = {name for line in code for name in re.findall(r"(?<![\w.])[A-Z][a-z]\w*(?=[(`.,:]|$)", line)}
    assert {"ExpertUpdater", "Rebalancer", "NcclOptions"} <= used
    assert used - set(dir(async_eplb)) - set(dir(errors)) == set()


def test_the_scripts_that_are_named_exist() -> None:
    """Every ``scripts/...`` can be run."""
    for name in set(re.findall(r"scripts/(\w+)", README)):
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111
