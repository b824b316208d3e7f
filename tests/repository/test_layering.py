"""Imports point one way: a file imports from its own row of the table and from rows above it."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import async_eplb

LAYERS = [
    "errors modes",
    "arguments groups files",
    "topology placement",
    "event_loop workers device events slots",
    "weights scratch staging map_tables expert_map",
    "load policy plan agreement",
    "transport verify commit",
    "options",
    "update",
    "recovery",
    "updater",
    "rebalancer sync sync_rebalancer",
    "testing report simulate fuzz",
    "cli",
    "__main__",
]
"""Folders and single files; between those of one row, imports make no circle either."""

PURE = [
    "errors",
    "arguments",
    "files",
    "topology",
    "placement",
    "policy",
    "plan",
    "agreement",
    "load/value",
    "recovery/survivors",
]
WITH_THREADS = ["agreement/shared", "agreement/steps"]

ROOT = Path(async_eplb.__file__).parent
ROWS = {name: number for number, row in enumerate(LAYERS) for name in row.split()}


def folder_of(path: Path) -> str:
    """Return the folder, or the single file, of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the folders of the table that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("async_eplb.")}


IMPORTS = {path: imported(path) - {folder_of(path)} for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT} | {
    path: imported(path) for path in sorted(ROOT.glob("*.py")) if path.name != "__init__.py"
}


def test_every_folder_is_in_the_table() -> None:
    """A new one gets a place."""
    assert {folder_of(path) for path in IMPORTS} == set(ROWS)


def test_imports_point_upward() -> None:
    """From a folder's own row or one above."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, names in IMPORTS.items()
        for name in names
        if ROWS[name] > ROWS[folder_of(path)]
    ]
    assert wrong == []


def test_folders_of_a_row_make_no_circle() -> None:
    """Taking away what imports nothing that is left, again and again, leaves nothing."""
    left = {
        folder: {name for p, names in IMPORTS.items() if folder_of(p) == folder for name in names} for folder in ROWS
    }
    while free := [folder for folder, names in left.items() if not names & set(left)]:
        for folder in free:
            del left[folder]
    assert left == {}


@pytest.mark.parametrize("name", PURE)
def test_what_is_pure_knows_no_tensor_group_or_thread(name: str) -> None:
    """Everything up to the plan, and the agreement's rules: values in, values out."""
    place = ROOT / name
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for path in files:
        if str(path.relative_to(ROOT).with_suffix("")) not in WITH_THREADS:
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
            assert not [n for n in names if n.split(".")[0] in {"torch", "threading", "anyio", "socket", "time"}], path


@pytest.mark.parametrize(
    "statement",
    [
        "import async_eplb.policy",
        "import async_eplb.plan",
        "from async_eplb import ExpertLoad, ExpertPlacement, EPTopology, Incremental, RebalanceTerms",
        "from async_eplb import on_survivors, plan_update, relabel",
    ],
)
def test_planning_takes_no_torch(statement: str) -> None:
    """Whoever chooses or plans placements does not wait for it."""
    subprocess.run([sys.executable, "-c", f"import sys; {statement}; assert 'torch' not in sys.modules"], check=True)


def test_public_names_are_where_the_type_checker_finds_them() -> None:
    """The table that names are looked up in, and the imports that are for type checkers only."""
    block = next(node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(seen) == set(dir(async_eplb)) - set(vars(async_eplb))
    for name, module in seen.items():
        assert getattr(async_eplb, name) is getattr(import_module(str(module)), name)
