"""A live view of a running server's updates, in the terminal."""

import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from async_eplb.errors import InvalidOptions, MissingExtra, UnreadableLog
from async_eplb.report.live import LiveState, LiveUpdate, Tail
from async_eplb.report.sources import STANDARD_INPUT, find_logs
from async_eplb.report.text import in_bytes, in_ms

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

INTERVAL_S = 0.5
_MAX_RANKS = 16
_BAR = 24


def follow(names: Sequence[str]) -> int:
    """Show what logs say as they are written, until interrupted.

    :raises InvalidOptions: for standard input, which cannot be read twice
    :raises MissingExtra: without rich
    :raises UnreadableLog: if a named log is not there
    """
    if STANDARD_INPUT in names:
        raise InvalidOptions("--follow reads files and folders, not standard input", option="follow")
    try:
        from rich.live import Live  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("--follow needs rich; pip install 'async-eplb[cli]'", extra="cli") from error
    find_logs(names)
    state, tail = LiveState(), Tail()
    interrupts: list[int] = []  # an exception could come in the middle of a frame, or where Python ignores it
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        with Live(view(state), auto_refresh=False) as live:
            while not interrupts:
                lines = tail.new_lines(_logs_now(names))
                if lines:
                    state.take(lines)
                    live.update(view(state), refresh=True)
                time.sleep(INTERVAL_S)
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def view(state: LiveState) -> "RenderableType":
    """Return what is shown: the last updates, and how far each rank is in the current one."""
    from rich.console import Group  # noqa: PLC0415 - an extra

    if not state.updates:
        return f"waiting for an update ({state.num_events} events read, {state.num_left_out} lines left out)"
    current = list(state.updates.values())[-1]
    return Group(_updates(list(state.updates.values())), _ranks(current), *_notes(state))


def _logs_now(names: Sequence[str]) -> list[str]:
    """Return the logs that there are now; a rank may have added one, or be about to replace one."""
    found: list[str] = []
    for name in names:
        try:
            found += find_logs([name])
        except UnreadableLog:
            continue
    return found


def _updates(updates: list[LiveUpdate]) -> "Table":
    from rich.markup import escape  # noqa: PLC0415 - an extra
    from rich.table import Table  # noqa: PLC0415 - an extra

    table = Table(title="updates", title_justify="left")
    for column in ("update", "mode", "outcome", "duration", "layers", "received", "worst stall", "fence waits"):
        table.add_column(column, justify="left" if column in ("mode", "outcome") else "right")
    styles = {"failed": "red", "finished": "green", "running": "yellow"}
    for update in updates:
        committed = min((update.done[rank, "commit"] for rank in range(update.num_ranks)), default=0)
        table.add_row(
            str(update.generation),
            escape(update.mode),
            f"[{styles[update.outcome]}]{update.outcome}[/] {escape(update.error)}",
            in_ms(update.duration_ms) if update.ended else "",
            f"{committed}/{update.num_layers}",
            in_bytes(update.received_nbytes),
            in_ms(max(update.stalls_ms.values())) if update.stalls_ms else "",
            str(update.num_fence_waits),
        )
    return table


def _ranks(update: LiveUpdate) -> "Table":
    from rich.table import Table  # noqa: PLC0415 - an extra

    slowest = sorted(range(update.num_ranks), key=lambda rank: (update.done[rank, "commit"], rank))
    title = f"update {update.generation}, layers done"
    if len(slowest) > _MAX_RANKS:
        title += f" by the {_MAX_RANKS} ranks that are furthest behind, of {len(slowest)}"
    table = Table(title=title, title_justify="left")
    for column in ("rank", "plan", "transfer", "commit"):
        table.add_column(column, justify="right" if column == "rank" else "left")
    for rank in sorted(slowest[:_MAX_RANKS]):
        bars = (_bar(update.done[rank, stage], update.num_layers) for stage in ("plan", "transfer", "commit"))
        table.add_row(str(rank), *bars)
    return table


def _bar(done: int, total: int) -> str:
    full = _BAR * done // max(total, 1)
    return f"{'━' * full}[dim]{'─' * (_BAR - full)}[/] {done}"


def _notes(state: LiveState) -> Iterator[str]:
    if state.balancedness is not None:
        yield "balancedness {:.3g} before, {:.3g} after the last rebalance".format(*state.balancedness)
    if state.num_dropped:
        yield f"[red]{state.num_dropped} events were dropped by the ranks' logs[/]"
    yield f"[dim]{state.num_events} events read, {state.num_left_out} lines left out; Ctrl-C ends[/]"
