"""The examples run and print the output in their docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_what_its_docstring_shows(path: Path, tmp_path: Path) -> None:
    """The block that begins with the command, line for line."""
    (shown,) = re.findall(rf"    \$ python examples/{path.name}\n((?:    .*\n)+)", path.read_text())
    run = subprocess.run([sys.executable, path], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [line.removeprefix("    ") for line in shown.splitlines()]


def test_every_example_is_listed() -> None:
    """One line each in the folder's README."""
    listed = re.findall(r"^- \[`(.*?)`\]", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == sorted(path.name for path in EXAMPLES.glob("*.py"))
