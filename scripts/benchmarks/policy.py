"""What policies take and reach: times, and after a drift of the load the receives and the balance.

58 layers of 256 experts in 288 slots, 32 ranks on 4 nodes. Tokens of an expert are gamma-distributed (shape 1); a
drift multiplies each by a lognormal factor (sigma 0.1 or 0.3). Each policy starts from its own full replan before the
drift: ``global``, or ``grouped`` (``Hierarchical`` with 8 groups, each on one node). There, ``Incremental`` swaps two
groups between nodes in layers where that pays, and ``staying`` is the same without that: its peaks cannot be below
``staying_floor``, the most loaded node over the mean, where the full replan regroups all layers.

Receives are shares of all slots. Peaks are the most loaded rank over the mean, averaged over layers and seeds;
``worst_peak`` is the highest of all.

Times are medians in one thread: ``_ms`` by the wall clock, which other processes disturb, ``_cpu_ms`` by the thread's.

Predicted before the first run of this benchmark, from trials of its parts: hierarchical 2 ms; incremental 21 ms at 10 %
drift and 38 ms at 30 %, with groups 25 and 34 ms; receives 4.9 % and 7.4 %, worst peak 1.02 (a full replan: 96 %); with
groups 5.6 % and 12 % for average peaks of 1.049 and 1.061, where the full replan has 1.048 and 1.053 for 86 % and 91 %;
staying, 5.5 % and 6.5 % for 1.049 and 1.074.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.load.value import ExpertLoad
from async_eplb.policy import Global, Hierarchical, Incremental, rank_costs, receives
from async_eplb.policy.objective import FloatArray

_LAYERS, _EXPERTS, _GROUPS = 58, 256, 8
_TOPOLOGY = EPTopology(num_ranks=32, num_nodes=4, num_local_physical_experts=9)
_SIGMAS = {"10": 0.1, "30": 0.3}

Replan = Callable[[ExpertLoad], ExpertPlacement]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--seeds", type=int, default=8, help="loads and drifts that are averaged (default: 8)")
    parser.add_argument("--runs", type=int, default=15, help="runs of which a time is the median (default: 15)")
    parser.add_argument("--layers", type=int, default=_LAYERS, help=f"layers (default: {_LAYERS})")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return times in milliseconds, receives as shares of all slots, and peaks over means."""
    torch.set_num_threads(1)
    replans: dict[str, tuple[Replan, int | None]] = {
        "global": (partial(Global().place, topology=_TOPOLOGY), None),
        "grouped": (partial(Hierarchical(_GROUPS).place, topology=_TOPOLOGY), _GROUPS),
    }
    figures: dict[str, float] = {}
    load, _ = _drift(0, 0.0, options.layers)
    for name, (replan, num_groups) in replans.items():
        figures |= _times(f"{name}_replan", partial(replan, load), options.runs)
        for percent, sigma in _SIGMAS.items():
            figures |= _measure(f"{name}_drift_{percent}", replan, num_groups, sigma, options)
    return figures


def _measure(
    name: str, replan: Replan, num_groups: int | None, sigma: float, options: argparse.Namespace
) -> dict[str, float]:
    """Compare a full replan with the incremental policy after a drift."""
    shares: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[FloatArray]] = defaultdict(list)
    for seed in range(options.seeds):
        before, after = _drift(seed, sigma, options.layers)
        current = replan(before)
        peaks["before"].append(_peak(after, current))
        policy = Incremental(num_groups=num_groups)
        results = {"replan": replan(after), "incremental": policy(after, current, _TOPOLOGY)}
        if num_groups is not None:
            staying = replace(policy, regroup_above=math.inf, replan_above=math.inf)
            results["staying"] = staying(after, current, _TOPOLOGY)
            nodes = rank_costs(after, current, _TOPOLOGY).reshape(options.layers, _TOPOLOGY.num_nodes, -1).mean(axis=2)
            peaks["staying_floor"].append(nodes.max(axis=1) / nodes.mean(axis=1))
        for kind, result in results.items():
            received = receives(current, result, _TOPOLOGY).sum(axis=1).mean()
            shares[kind].append(float(received) / _TOPOLOGY.num_physical_experts)
            peaks[kind].append(_peak(after, result))
    figures = {f"{name}_{kind}_receives": float(np.mean(values)) for kind, values in shares.items()}
    figures |= {f"{name}_{kind}_peak": float(np.mean(values)) for kind, values in peaks.items()}
    figures |= {f"{name}_{kind}_worst_peak": float(np.max(peaks[kind])) for kind in shares}
    return figures | _times(f"{name}_incremental", partial(policy, after, current, _TOPOLOGY), options.runs)


def _drift(seed: int, sigma: float, num_layers: int) -> tuple[ExpertLoad, ExpertLoad]:
    """Return a load, and what it has become."""
    rng = np.random.default_rng(seed)
    before = 1000 * rng.gamma(1.0, size=(num_layers, _EXPERTS))
    after = before * np.exp(sigma * rng.standard_normal(before.shape))
    return ExpertLoad.from_counts(before), ExpertLoad.from_counts(after)


def _peak(load: ExpertLoad, placement: ExpertPlacement) -> FloatArray:
    """Return the most loaded rank over the mean ``[layers]``."""
    costs = rank_costs(load, placement, _TOPOLOGY)
    return np.asarray(costs.max(axis=1) / costs.mean(axis=1))


def _times(name: str, call: Callable[[], object], runs: int) -> dict[str, float]:
    """Return the median time of a call, by the wall clock and by this thread's."""
    call()
    wall, thread = [], []
    for _ in range(runs):
        start = time.perf_counter(), time.thread_time()
        call()
        wall.append(time.perf_counter() - start[0])
        thread.append(time.thread_time() - start[1])
    return {f"{name}_ms": median(wall) * 1e3, f"{name}_cpu_ms": median(thread) * 1e3}
