"""The wheel: built from the tree, complete, and enough to run the demo where nothing else is."""

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as a release would."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.iterdir()
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every file of the package, data and the marker of its types among them, and the metadata."""
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "async_eplb").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {str(path.relative_to(ROOT)) for path in package}
    assert {"async_eplb/py.typed", "async_eplb/data/deepseek_example.json"} <= names


def required_by(name: str) -> set[str]:
    """Return the names of the installed distributions that one needs, itself among them, without any extra."""
    found: set[str] = set()
    names = [name]
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            names += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def link_into(folder: Path, name: str) -> None:
    """Make what a distribution has installed importable from another folder."""
    for file in distribution(name).files or ():
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (folder / top).exists():
            (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))


def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, away from the tree, with the core dependencies only; those are linked, to spare time."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-compile", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in required_by("async-eplb") - {"async-eplb"}:
        link_into(packages, name)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [python, "-m", "async_eplb", "demo", "--ranks", "2"],
        cwd=tmp_path,
        env=outside,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Every byte of every slot on every rank is right" in run.stdout
