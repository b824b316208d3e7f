"""What commands show: tables of plain text, and progress bars where rich is installed (extra ``cli``)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from async_eplb.report.text import aligned

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    HAS_RICH = False
else:
    HAS_RICH = True


class Advance(Protocol):
    """Counts one more of something as done."""

    def __call__(self, name: str) -> None:
        """Advance the bar of that name."""
        ...


@contextmanager
def progress(totals: dict[str, int]) -> Iterator[Advance]:
    """Show one bar for each name on standard error, until the body ends; without rich, show nothing.

    :param totals: name → how often it will be advanced
    """
    if not HAS_RICH:
        yield lambda name: None  # noqa: ARG005 - the protocol's name
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name: bars.advance(tasks[name])


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title on standard output, then labels and values, one pair a line."""
    width = max(len(label) for label, _ in rows)
    print(title, *(f"  {label:<{width}}  {value}" for label, value in rows), sep="\n")


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a title on standard output, then a table with a header; columns but the first hold numbers."""
    print(title, *(f"  {line}" for line in aligned((header, *rows))), sep="\n")
