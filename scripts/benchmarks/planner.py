"""How long planning takes beside the reference method, and what relabelling, relays and balance save.

Loads are gamma-distributed (shape 1) and drift by a lognormal factor (sigma 0.1). The old placement is
``hierarchical``'s before the drift, 8 groups where there are several nodes, the new one its after it; for the savings
also ``incremental``'s from the old one.

Times are medians for all layers of one rank, of the thread's own time: ``columns`` until a layer's plan can be
asked for, ``plan`` until all plans are made, ``posted`` with their groups too (64 transfers at most), as the pipeline
asks for them; ``balanced`` and ``relayed`` as ``plan``. ``slot_by_slot`` is the reference
method, ``plan_layer`` the library's readable one; both are timed for some of the layers and multiplied.

Savings are means over layers and seeds: receives as shares of all slots; crossings, of experts between nodes, as
shares of all slots; ``busiest`` the transfers of the rank that sends most.

Predicted before the first run of this benchmark, from trials of its parts (random placements, which move more): plan
4.0 ms at 288/8, 3.4 at 288/32, 3.2 at 320/320, 12.5 at 1024/128; plan_layer 82 ms at 288/8, so 20 times that, and
slot by slot, about 5 ms a layer, 70 times; relabel saves 9 % of receives at 288/8 and 17 % at 288/32; relays save as
many crossings as there are duplicates, some 5 % at 288/32; the busiest sender sends 25 % less if balanced.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from async_eplb import EPTopology, ExpertPlacement, Planner, plan_layer, plan_update, relabel
from async_eplb.load.value import ExpertLoad
from async_eplb.plan import PostedUpdate, Transfers
from async_eplb.policy import hierarchical, incremental
from benchmarks._slot_by_slot import plan_slot_by_slot

_SHAPES = {
    "288_8": (58, 256, EPTopology(8, 1, 36)),
    "288_32": (58, 256, EPTopology(32, 4, 9)),
    "320_320": (58, 256, EPTopology(320, 40, 1)),
    "1024_128": (61, 896, EPTopology(128, 16, 8)),
}
"""Slots and ranks → layers, logical experts, topology."""

_SIGMA, _GROUPS, _LIMIT = 0.1, 8, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--seeds", type=int, default=4, help="loads and drifts that savings average (default: 4)")
    parser.add_argument("--runs", type=int, default=21, help="runs of which a time is the median (default: 21)")
    parser.add_argument("--layers", type=int, help="layers (default: 58, and 61 of the largest)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return times in milliseconds, ratios, and savings."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name, (num_layers, num_experts, topology) in _SHAPES.items():
        layers = options.layers or num_layers
        old, new, _ = _drift(0, layers, num_experts, topology)
        figures |= {f"{name}_{key}": value for key, value in _times(old, new, topology, options.runs).items()}
        if name.startswith("288"):
            figures |= {
                f"{name}_{key}": value for key, value in _savings(layers, num_experts, topology, options.seeds).items()
            }
    size = {name: layers * topology.num_physical_experts for name, (layers, _, topology) in _SHAPES.items()}
    figures["growth_of_time"] = figures["1024_128_plan_ms"] / figures["288_32_plan_ms"]
    figures["growth_of_layers_times_slots"] = size["1024_128"] / size["288_32"]
    return figures


def _drift(
    seed: int, num_layers: int, num_experts: int, topology: EPTopology
) -> tuple[ExpertPlacement, ExpertPlacement, ExpertLoad]:
    """Return a placement, the one after a drift, and the load then."""
    rng = np.random.default_rng(seed)
    before = 1000 * rng.gamma(1.0, size=(num_layers, num_experts))
    after = before * np.exp(_SIGMA * rng.standard_normal(before.shape))
    loads = ExpertLoad.from_counts(before), ExpertLoad.from_counts(after)
    groups = _GROUPS if _GROUPS % topology.num_nodes == 0 else 1
    old, new = (hierarchical(load, topology, num_groups=groups) for load in loads)
    return old, new, loads[1]


def _times(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology, runs: int) -> dict[str, float]:
    maps = (old.physical_to_logical_map, new.physical_to_logical_map)
    layers = old.num_layers
    sample = range(0, layers, max(1, layers // 6))
    rows = [(maps[0][layer].tolist(), maps[1][layer].tolist()) for layer in sample]
    planned = plan_update(old, new, topology, 0)
    for layer, row in zip(sample, rows, strict=True):
        if not planned[layer] == plan_layer(*row, topology, 0) == plan_slot_by_slot(*row, topology, 0):
            raise RuntimeError(f"the plans of layer {layer} differ")

    def post() -> None:
        posted = PostedUpdate(plan_update(old, new, topology, 0), [_LIMIT] * layers)
        for layer in range(layers):
            posted[layer]

    figures = {
        "columns_ms": _median_ms(lambda: plan_update(old, new, topology, 0), runs),
        "plan_ms": _median_ms(lambda: list(plan_update(old, new, topology, 0)), runs),
        "posted_ms": _median_ms(post, runs),
    }
    for name in ("balanced", "relayed"):
        planner = Planner(name)
        figures[f"{name}_ms"] = _median_ms(lambda p=planner: list(plan_update(old, new, topology, 0, planner=p)), 3)  # type: ignore[misc]
    for name, plan in {"plan_layer": plan_layer, "slot_by_slot": plan_slot_by_slot}.items():
        taken = _median_ms(lambda p=plan: [p(*row, topology, 0) for row in rows], 3)  # type: ignore[misc]
        figures[f"{name}_ms"] = taken / len(rows) * layers
        for part in ("columns", "plan"):
            figures[f"{name}_over_{part}"] = figures[f"{name}_ms"] / figures[f"{part}_ms"]
    figures["relabel_ms"] = _median_ms(lambda: relabel(old, new, topology), 3)
    return figures


def _savings(num_layers: int, num_experts: int, topology: EPTopology, seeds: int) -> dict[str, float]:
    """Compare what moves: as it is planned, relabelled, relayed, balanced; for a full replan and incrementally."""
    figures: dict[str, list[float]] = defaultdict(list)
    slots = num_layers * topology.num_physical_experts
    for seed in range(seeds):
        old, replan, load = _drift(seed, num_layers, num_experts, topology)
        groups = _GROUPS if topology.num_nodes > 1 else None
        targets = {
            "replan": replan,
            "relabel": relabel(old, replan, topology),
            "incremental": incremental(load, old, topology, num_groups=groups),
        }
        targets["incremental_relabel"] = relabel(old, targets["incremental"], topology)
        for target, new in targets.items():
            for sources in ("chunked", "balanced", "relayed"):
                moved = Planner(sources).transfers(old.physical_to_logical_map, new.physical_to_logical_map, topology)
                name = f"{target}_{sources}"
                figures[f"{name}_crossings"].append(float((~moved.same_node).sum()) / slots)
                figures[f"{name}_busiest"].append(_busiest(moved, num_layers, topology))
            figures[f"{target}_receives"].append(len(moved.layer) / slots)
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    for target in ("relabel", "incremental", "incremental_relabel"):
        means[f"{target}_saves_receives"] = 1 - means[f"{target}_receives"] / means["replan_receives"]
    return means


def _busiest(moved: Transfers, num_layers: int, topology: EPTopology) -> float:
    """Return the transfers of the rank that sends most, averaged over layers."""
    sent = np.bincount(moved.layer * topology.num_ranks + moved.src_rank, minlength=num_layers * topology.num_ranks)
    return float(sent.reshape(num_layers, -1).max(axis=1).mean())


def _median_ms(call: Callable[[], object], runs: int) -> float:
    call()
    taken = []
    for _ in range(runs):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return median(taken) * 1e3
