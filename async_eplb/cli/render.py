"""What the terminal shows: a progress bar and a table; plain lines where rich is not installed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from async_eplb.report.text import aligned

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Table
except ImportError:
    HAS_RICH = False
else:
    HAS_RICH = True


class Advance(Protocol):
    """Says that one more of something is done."""

    def __call__(self, name: str) -> None:
        """Advance the bar of that name."""
        ...


@contextmanager
def progress(totals: dict[str, int]) -> Iterator[Advance]:
    """Show one bar for each name on standard error, until the body ends.

    :param totals: name → how often it will be advanced
    """
    if not HAS_RICH:
        done = dict.fromkeys(totals, 0)

        def count(name: str) -> None:
            done[name] += 1

        yield count
        print(", ".join(f"{name} {done[name]}/{totals[name]}" for name in totals), file=sys.stderr)
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name: bars.advance(tasks[name])


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print labels and values on standard output."""
    if not HAS_RICH:
        width = max(len(label) for label, _ in rows)
        print(title, *(f"{label:<{width}}  {value}" for label, value in rows), sep="\n")
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a header on standard output; the first column is text, the others are numbers."""
    if not HAS_RICH:
        print(title, *aligned((header, *rows)), sep="\n")
        return
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
