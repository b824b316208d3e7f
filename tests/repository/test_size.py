"""No module, class or constructor grows beyond what one can keep in mind."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "async_eplb"
MAX_LINES = 350
MAX_ATTRIBUTES = 15
MAX_PARAMETERS = 8
EXCEPTIONS = {
    "updater.py: ExpertUpdater": "its parameters are what a user has, all but five by name and optional",
    "sync.py: SyncUpdater": "the same, and one more",
    "report/records.py: UpdateReport": "the keys of one flat record of the report's JSON",
}
"""Larger ones, three at most: name → reason."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def data_fields(node: ast.ClassDef) -> list[str]:
    """Return what is annotated in the body of a class."""
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and not ast.unparse(each.annotation).startswith(("ClassVar", "InitVar"))
    ]


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class gives its instances: annotated in its body, or assigned in any method."""
    found = set(data_fields(node))
    for method in node.body:
        if not isinstance(method, Function) or not method.args.args:
            continue
        own = method.args.args[0].arg
        found |= {
            each.attr
            for each in ast.walk(method)
            if isinstance(each, ast.Attribute)
            and isinstance(each.ctx, ast.Store)
            and isinstance(each.value, ast.Name)
            and each.value.id == own
        }
    return found


def num_parameters(node: ast.ClassDef) -> int:
    """Return how many parameters a constructor has that is written out; a dataclass has its fields, counted above."""
    for method in node.body:
        if isinstance(method, Function) and method.name == "__init__":
            given = method.args
            return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
    return 0


def too_large() -> dict[str, str]:
    """Return what is beyond the limits, with its size."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module, text = str(path.relative_to(PACKAGE)), path.read_text()
        num_lines = len(text.splitlines())
        if num_lines > MAX_LINES:
            found[module] = f"{num_lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found |= too_large_class(f"{module}: {node.name}", node)
    return found


def too_large_class(name: str, node: ast.ClassDef) -> dict[str, str]:
    """Return what of a class is beyond the limits."""
    num_attributes, num_given = len(attributes(node)), num_parameters(node)
    sizes = []
    if num_attributes > MAX_ATTRIBUTES:
        sizes.append(f"{num_attributes} attributes")
    if num_given > MAX_PARAMETERS:
        sizes.append(f"{num_given} constructor parameters")
    return {name: ", ".join(sizes)} if sizes else {}


def test_nothing_is_too_large() -> None:
    """Cut it by its data; a reason for an exception must be better than the cut."""
    assert {name: size for name, size in too_large().items() if name not in EXCEPTIONS} == {}


def test_exceptions_are_few_and_needed() -> None:
    """No exception is kept for a name within the limits."""
    assert len(EXCEPTIONS) <= 3
    assert set(EXCEPTIONS) <= set(too_large())
