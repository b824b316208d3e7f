"""A report as lines of text."""

import math
from collections.abc import Iterable, Iterator, Sequence

from async_eplb.events.stages import STAGES
from async_eplb.report.records import LayerReport, LinkReport, RankReport, Report, UpdateReport

_MAX_LISTED = 8


def in_bytes(nbytes: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:  # noqa: PLR2004
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def report_lines(report: Report) -> Iterator[str]:
    """Yield the report: updates, rebalances, slowest layers and links, lagging ranks, faults, lines left out."""
    for update in report.updates:
        yield from update_lines(update)
        yield ""
    stayed = [rebalance for rebalance in report.rebalances if not rebalance.pays]
    if stayed:
        reasons = ", ".join(sorted({rebalance.reason for rebalance in stayed}))
        yield f"{len(stayed)} of {len(report.rebalances)} rebalances moved nothing ({reasons})"
        yield ""
    yield from _section("slowest layers", _layer_rows(report.slowest_layers))
    yield from _section("slowest links", _link_rows(report.slowest_links))
    yield from _section("ranks that lag", _rank_rows(report.lagging_ranks))
    if report.clock_error_ms:
        yield f"times of ranks of different hosts are right to {in_ms(report.clock_error_ms)}"
    for title, lines in (("faults", report.faults), ("left out", report.left_out)):
        if lines:
            yield ""
            yield f"{title}:"
            yield from (f"  {line}" for line in lines)


def update_lines(update: UpdateReport) -> Iterator[str]:
    """Yield the lines of one update."""
    ranks = f"{update.num_ranks} ranks on {update.num_nodes} node{'s' if update.num_nodes > 1 else ''}"
    missing = update.num_ranks - update.num_ranks_logged
    yield (
        f"update {update.generation} of run {update.run_id[:8]}: {update.outcome}, {update.mode}, {ranks}"
        + (f", {missing} of them not in the log" if missing else "")
    )
    if update.error:
        yield f"  error             {update.error}"
    yield f"  duration          {in_ms(update.duration_ms)}"
    skipped = f"{update.num_unchanged_layers} skipped{_list(update.skipped_layers)}"
    yield f"  layers            {update.num_layers} moved, {skipped}"
    yield (
        f"  bytes received    {in_bytes(update.received_nbytes_within_node)} within nodes, "
        f"{in_bytes(update.received_nbytes_across_nodes)} across nodes"
    )
    yield (
        f"  bytes copied      {in_bytes(update.copied_nbytes)} from the same GPU, "
        f"{in_bytes(update.committed_nbytes)} committed"
    )
    times = ", ".join(f"{stage.label} {in_ms(getattr(update, stage.total))}" for stage in STAGES)
    yield f"  slowest rank      {times}"
    yield f"  overlap           {_number(update.overlap)} (stage time over duration)"
    if update.num_stalls:
        yield (
            f"  stall of a step   p50 {in_ms(update.stall_p50_ms)}, p99 {in_ms(update.stall_p99_ms)}, "
            f"max {in_ms(update.stall_max_ms)} ({update.num_stalls} steps)"
        )
    if update.num_fence_waits:
        yield f"  waits at fences   {update.num_fence_waits}, {in_ms(update.fence_wait_ms)} together"
    if update.num_passes_beside:
        yield (
            f"  passes beside it  p50 {in_ms(update.pass_beside_p50_ms)}, p99 {in_ms(update.pass_beside_p99_ms)}, "
            f"max {in_ms(update.pass_beside_max_ms)}; others p50 {in_ms(update.pass_p50_ms)}, "
            f"p99 {in_ms(update.pass_p99_ms)}"
        )
    if not math.isnan(update.balancedness_before):
        yield (
            f"  balancedness      {_number(update.balancedness_before)} before, "
            f"{_number(update.balancedness_after)} after"
        )
    if not math.isnan(update.break_even_steps):
        yield (
            f"  paid              {in_ms(update.saved_ms_per_step)} saved a step: paid back after "
            f"{update.break_even_steps:.0f} steps"
        )


def comparison_lines(names: tuple[str, str], first: Report, second: Report) -> Iterator[str]:
    """Yield the figures of two reports side by side, with the ratio of the second to the first."""
    ours, theirs = first.figures(), second.figures()
    rows = [("", *names, "ratio")]
    for name, value in ours.items():
        ratio = theirs[name] / value if value else math.nan
        rows.append((name, _number(value), _number(theirs[name]), _number(ratio)))
    yield from aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield each row as a line, columns padded to equal width: the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def in_ms(ms: float) -> str:
    """Return a time with a fitting unit."""
    if math.isnan(ms):
        return "unknown"
    if ms >= 10_000:  # noqa: PLR2004
        return f"{ms / 1e3:.1f} s"
    return f"{ms:.1f} ms" if ms >= 1 else f"{ms * 1e3:.0f} µs"


def _section(title: str, rows: list[Sequence[str]]) -> Iterator[str]:
    if len(rows) > 1:
        yield title
        yield from (f"  {line}" for line in aligned(rows))
        yield ""


def _layer_rows(layers: Iterable[LayerReport]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("update", "layer", "rank", "total", *(stage.label for stage in STAGES), "bytes")]
    for layer in layers:
        times = (layer.total_ms, *(getattr(layer, stage.total) for stage in STAGES))
        place = (str(layer.generation), str(layer.layer), str(layer.rank))
        rows.append((*place, *map(in_ms, times), in_bytes(layer.nbytes)))
    return rows


def _link_rows(links: Iterable[LinkReport]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("from", "to", "link", "bytes", "speed")]
    for link in links:
        kind = "same node" if link.within_node else "across nodes"
        speed = f"{in_bytes(link.nbytes_per_s)}/s"
        rows.append((str(link.src_rank), str(link.dst_rank), kind, in_bytes(link.nbytes), speed))
    return rows


def _rank_rows(ranks: Iterable[RankReport]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("rank", "staged after the median", "last in")]
    rows += [
        (str(rank.rank), in_ms(rank.lag_ms), f"{rank.num_last} of {rank.num_layers} layers")
        for rank in ranks
        if rank.lag_ms > 0
    ]
    return rows


def _list(layers: tuple[int, ...]) -> str:
    if not layers:
        return ""
    shown = ", ".join(map(str, layers[:_MAX_LISTED]))
    return f" ({shown}{', …' if len(layers) > _MAX_LISTED else ''})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"  # noqa: PLR2004
