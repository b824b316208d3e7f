"""A picture of simulated updates: their time and bytes by number of ranks, and each layer of the largest."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from async_eplb.simulate import Outcome

Outcomes = Mapping[int, Mapping[str, Outcome]]
"""Ranks → plan → what it takes."""

_COLOURS = {
    "reference": "#9aa0a6",
    "balanced": "#8ab4d8",
    "relabel": "#4a7fb5",
    "relay": "#1f4e79",
}
_MOST_LAYER_PANELS = 5


def draw(path: Path, title: str, outcomes: Outcomes) -> None:
    """Draw outcomes and write them as a picture, in the format of the file's ending."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(f"Simulated updates: {title}", fontsize=13)
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    totals = above.subplots(1, 3)
    for axes, draw_total in zip(totals, (_draw_times, _draw_bytes, _draw_host_times), strict=True):
        draw_total(axes, outcomes)
    shown = list(outcomes)[-_MOST_LAYER_PANELS:]
    below.supxlabel("layers, the slowest first, each line in its own order", fontsize=10)
    for axes, num_ranks in zip(below.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_layers(axes, num_ranks, outcomes[num_ranks])
    below.axes[0].set_ylabel("ms of a layer")
    below.legend(
        *below.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, outcomes: Outcomes) -> tuple[dict[str, list[float]], float]:
    """Return where each plan's bars are, and how wide they are."""
    names = list(next(iter(outcomes.values())))
    width = 0.8 / len(names)
    axes.set_xticks(range(len(outcomes)), [str(num_ranks) for num_ranks in outcomes])
    axes.set_xlabel("ranks")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return {
        name: [place + (index - (len(names) - 1) / 2) * width for place in range(len(outcomes))]
        for index, name in enumerate(names)
    }, width


def _draw_times(axes: Axes, outcomes: Outcomes) -> None:
    places, width = _bars(axes, outcomes)
    for name, left in places.items():
        times = [by_name[name].time_s * 1e3 for by_name in outcomes.values()]
        bounds = [float(by_name[name].bound_s.sum()) * 1e3 for by_name in outcomes.values()]
        axes.bar(left, times, width, color=_COLOURS[name], label=name)
        edges = np.array(left)
        label = "bound" if name == list(places)[-1] else "_"
        axes.hlines(bounds, edges - width / 2, edges + width / 2, colors="black", label=label)
    axes.set_title("Time of an update (ms)", fontsize=11)
    axes.legend(fontsize=8, frameon=False)


def _draw_bytes(axes: Axes, outcomes: Outcomes) -> None:
    places, width = _bars(axes, outcomes)
    for name, left in places.items():
        across, within = (
            [
                100 * float(getattr(by_name[name].costs, kind).sum()) / max(1, _moved(by_name["reference"]))
                for by_name in outcomes.values()
            ]
            for kind in ("nbytes_across", "nbytes_within")
        )
        axes.bar(left, across, width, color=_COLOURS[name])
        axes.bar(left, within, width, bottom=across, color=_COLOURS[name], alpha=0.35)
    axes.set_title("Bytes across nodes (dark) and within (light), %", fontsize=11)


def _moved(outcome: Outcome) -> float:
    return float((outcome.costs.nbytes_across + outcome.costs.nbytes_within).sum())


def _draw_host_times(axes: Axes, outcomes: Outcomes) -> None:
    places, width = _bars(axes, outcomes)
    for name, left in places.items():
        axes.bar(left, [by_name[name].plan_ms for by_name in outcomes.values()], width, color=_COLOURS[name])
    relabels = [by_name["relabel"].relabel_ms for by_name in outcomes.values()]
    axes.plot(range(len(outcomes)), relabels, "x", color="#b5423c", label="to relabel, once")
    axes.set_yscale("log")
    axes.set_title("Host time to plan all layers (ms)", fontsize=11)
    axes.legend(fontsize=8, frameon=False)


def _draw_layers(axes: Axes, num_ranks: int, by_name: Mapping[str, Outcome]) -> None:
    for name in ("reference", "relay"):
        slowest_first = np.sort(by_name[name].costs.time_s)[::-1]
        axes.plot(slowest_first * 1e3, color=_COLOURS[name], label=name, linewidth=2)
    bounds = np.sort(by_name["relay"].bound_s)[::-1]
    axes.plot(bounds * 1e3, color="black", linestyle=":", label="bound of relay")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{num_ranks} ranks", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
