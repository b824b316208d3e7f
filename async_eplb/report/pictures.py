"""Pictures of an update by matplotlib: a timeline of all ranks, and a heat map of the bytes between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import einops
import numpy as np

from async_eplb.errors import InvalidOptions, MissingExtra
from async_eplb.events.stages import FENCE, STAGES, TRANSFER, Stage
from async_eplb.report.intervals import FROM_BELOW, MAX_LANES, TRACKS, Intervals, stage_intervals
from async_eplb.report.records import Traffic
from async_eplb.report.runs import Run
from async_eplb.report.text import in_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_LANE = 0.84
"""Height of a rank's lane, of 1."""
_MAX_LABELS = 40
_MAX_TICKS = 20
_MAX_NUMBERED = 500
_MAX_ANNOTATED = 16


def draw_timeline(run: Run, generation: int, path: Path) -> None:
    """Draw ranks by time: each has a lane with one line for each stage.

    :raises InvalidOptions: if the file's name ends in none of ``.png``, ``.svg``, ``.pdf``
    :raises MissingExtra: without matplotlib
    """
    intervals = stage_intervals(run, generation)
    figure, axes = _figure(path, (13.0, min(max(3.2, 0.42 * run.num_ranks + 1.6), 14.0)))
    start_s = min(float(each.starts_s.min()) for each in intervals.values() if len(each))
    height = _LANE / len(STAGES)
    if run.num_ranks <= MAX_LANES:
        for line, stage in enumerate(STAGES):
            _draw(axes, stage, intervals, start_s, line * height, height * 0.92)
    else:
        for stage in FROM_BELOW:
            _draw(axes, stage, intervals, start_s, 0.0, _LANE)
    _draw(axes, FENCE, intervals, start_s, 0.0, _LANE)
    drawn = [stage for stage in TRACKS if len(intervals[stage.name])]
    axes.legend(
        handles=[_patch(stage.colour) for stage in drawn],
        labels=[stage.label for stage in drawn],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.005),
        ncols=len(drawn),
        frameon=False,
    )
    for border in range(1, run.num_nodes):
        axes.axhline(
            border * run.num_ranks / run.num_nodes - (1 - _LANE) / 2, color="#555", linewidth=_line(run.num_nodes)
        )
    shown = range(0, run.num_ranks, -(-run.num_ranks // _MAX_LABELS))
    axes.set_yticks([rank + _LANE / 2 for rank in shown], [f"rank {rank}" for rank in shown])
    axes.set_ylim(run.num_ranks - (1 - _LANE) / 2, -(1 - _LANE) / 2)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("ms since the update began")
    axes.set_title(f"update {generation}: {_shape(run)}", loc="left", fontsize=11)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    _number_layers(axes, intervals[TRANSFER.name], start_s, (STAGES.index(TRANSFER) + 0.5) * height)
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def draw_matrix(traffic: Traffic, path: Path, *, title: str) -> None:
    """Draw bytes from rank to rank as a heat map; lines part the nodes.

    :raises InvalidOptions: if the file's name ends in none of ``.png``, ``.svg``, ``.pdf``
    :raises MissingExtra: without matplotlib
    """
    num_ranks = len(traffic.nbytes)
    per_node = num_ranks // traffic.num_nodes
    size = min(max(5.2, 0.52 * num_ranks + 2.2), 12.0)
    figure, axes = _figure(path, (size * 1.12, size))
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415 - an extra

    shown = np.ma.masked_equal(traffic.nbytes, 0)
    image = axes.imshow(shown, cmap="YlGnBu", vmin=0, vmax=max(int(traffic.nbytes.max()), 1), interpolation="nearest")
    axes.set_facecolor("#f6f7f9")
    figure.colorbar(image, ax=axes, label="bytes", fraction=0.046, pad=0.03).ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: in_bytes(value))
    )
    if num_ranks <= _MAX_ANNOTATED:
        for (src, dst), nbytes in np.ndenumerate(traffic.nbytes):
            dark = nbytes > traffic.nbytes.max() * 0.55
            text = in_bytes(float(nbytes)) if nbytes else ""
            axes.text(dst, src, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "#222")
    for border in range(1, traffic.num_nodes):
        for draw in (axes.axhline, axes.axvline):
            draw(border * per_node - 0.5, color="#333", linewidth=_line(traffic.num_nodes))
    step = -(-num_ranks // _MAX_TICKS)
    axes.set_xticks(range(0, num_ranks, step))
    axes.set_yticks(range(0, num_ranks, step))
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    within, across = _node_totals(traffic)
    axes.set_title(f"{title}\n{in_bytes(within)} within nodes, {in_bytes(across)} across", loc="left", fontsize=10)
    _save(figure, path)


def _node_totals(traffic: Traffic) -> tuple[float, float]:
    nodes = einops.reduce(
        traffic.nbytes, "(src a) (dst b) -> src dst", "sum", src=traffic.num_nodes, dst=traffic.num_nodes
    )
    within = float(np.trace(nodes))
    return within, float(nodes.sum()) - within


def _draw(
    axes: "Axes", stage: Stage, intervals: Mapping[str, Intervals], start_s: float, offset: float, height: float
) -> None:
    from matplotlib.collections import PolyCollection  # noqa: PLC0415 - an extra

    mine = intervals[stage.name]
    left, right = (mine.starts_s - start_s) * 1e3, (mine.ends_s - start_s) * 1e3
    top = mine.ranks + offset
    bottom = top + height
    corners = np.stack(
        [np.stack(pair, axis=1) for pair in ((left, top), (right, top), (right, bottom), (left, bottom))], axis=1
    )
    lines = 0.25 if len(mine) < 5000 else 0.0  # noqa: PLR2004 - thinner than a pixel above
    axes.add_collection(PolyCollection(list(corners), facecolors=stage.colour, edgecolors="white", linewidths=lines))
    axes.autoscale_view()


def _number_layers(axes: "Axes", transfers: Intervals, start_s: float, offset: float) -> None:
    """Write layers' numbers on their transfers, if there is room."""
    left, right = axes.get_xlim()
    wide = (transfers.ends_s - transfers.starts_s) * 1e3 > (right - left) / 60
    if len(transfers) > _MAX_NUMBERED:
        return
    middles = ((transfers.starts_s + transfers.ends_s) / 2 - start_s) * 1e3
    for rank, layer, middle in zip(transfers.ranks[wide], transfers.layers[wide], middles[wide], strict=True):
        axes.text(middle, rank + offset, str(layer), ha="center", va="center", fontsize=6, color="white")


def _shape(run: Run) -> str:
    return f"{run.num_ranks} ranks on {run.num_nodes} node{'s' if run.num_nodes > 1 else ''}"


def _line(num_nodes: int) -> float:
    """Return the width of lines between nodes: thin where there are many."""
    return min(1.0, 8.0 / num_nodes)


def _patch(colour: str) -> Any:  # noqa: ANN401 - an extra's type
    from matplotlib.patches import Patch  # noqa: PLC0415 - an extra

    return Patch(color=colour)


def _figure(path: Path, size: tuple[float, float]) -> "tuple[Figure, Axes]":
    if path.suffix not in _FORMATS:
        raise InvalidOptions(f"{path}: a picture's name ends in {', '.join(_FORMATS)}", option="picture")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib; pip install 'async-eplb[report]'", extra="report") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", path: Path) -> None:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
