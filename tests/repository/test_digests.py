"""What ranks compare is made of values, never of how Python prints them (rule 23)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import async_eplb

ROOT = Path(async_eplb.__file__).parent
PRINTS = {"repr", "str", "ascii", "format", "hash"}


def hashing(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield the functions that make a digest."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(part, ast.Name) and part.id == "hashlib" for part in ast.walk(node)
        ):
            yield node


def printed(function: ast.FunctionDef) -> list[str]:
    """Return what a function makes text of by Python's means."""
    return [
        ast.unparse(part)
        for part in ast.walk(function)
        if isinstance(part, ast.JoinedStr)
        or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in PRINTS)
    ]


def test_no_digest_is_made_of_printed_values() -> None:
    """Equal values may be printed in different ways; only traces of one program's runs are compared as text."""
    paths = [path for path in ROOT.rglob("*.py") if "fuzz" not in path.relative_to(ROOT).parts]
    functions = {(path, each.name): each for path in paths for each in hashing(ast.parse(path.read_text()))}
    assert len(functions) >= 3, "the digests of placements, of weights and of updates"
    assert {place: found for place, each in functions.items() if (found := printed(each))} == {}
