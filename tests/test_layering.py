"""Imports point only upward in the table of modules."""

import ast
from pathlib import Path

import async_eplb

LAYERS = [
    "errors",
    "events",
    "event_reference",
    "event_logger",
    "json_log",
    "metrics",
    "tracing",
    "topology",
    "documents",
    "placement",
    "load",
    "survivors",
    "policy",
    "plan",
    "simulate",
    "workers",
    "agreement",
    "driver",
    "device",
    "load_group",
    "weights",
    "checksum",
    "fused_checksum",
    "verify",
    "options",
    "transport",
    "weight_source",
    "staging",
    "expert_map",
    "commit_table",
    "fused_commit",
    "commit",
    "accounting",
    "audit",
    "admission",
    "watchdog",
    "stages",
    "update_run",
    "pipeline",
    "stepping",
    "handle",
    "recovery",
    "updater",
    "sync",
    "rebalancer",
    "launch",
    "sample_model",
    "simulation",
    "report",
    "cli",
    "__main__",
    "testing",
]
ROOT = Path(async_eplb.__file__).parent


def module_of(path: Path) -> str:
    """Return the row of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the rows of the table that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("async_eplb.")}


def test_imports_point_upward() -> None:
    """A module imports from its own row and from rows above it."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.rglob("*.py")
        if (row := module_of(path)) != "__init__"
        for name in imported(path)
        if LAYERS.index(name) > LAYERS.index(row)
    ]
    assert wrong == []


def test_every_module_is_in_the_table() -> None:
    """A new module gets a row."""
    assert {module_of(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(LAYERS)


def test_planning_knows_no_process_group() -> None:
    """Everything up to the plan, and the agreement, is pure."""
    pure = LAYERS[: LAYERS.index("agreement") + 1]
    files = [path for path in ROOT.rglob("*.py") if module_of(path) in pure]
    assert not [path for path in files if "torch.distributed" in path.read_text()]
