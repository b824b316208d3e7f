"""What serving on a GPU loses while experts move: step times of ranks that share one, with four ways of moving them.

A step is what a model does between two boundaries: for each of its layers, a matrix product with a live expert, an all-
to-all over NCCL, another product, another all-to-all; it is captured in a CUDA graph, as engines do for decoding. Then
the host waits for the device, as for a sampled token. Experts have the shapes of DeepSeek-V3 in FP8, 44 MB in four
tensors; each update brings some to every rank.

- ``idle``: experts stay
- ``again``: the same once more, which shows what a ratio is worth
- ``ready``: the library is open, and experts stay
- ``copy_engine``, ``nccl``: the library, updates one after another
- ``blocking``: what engines do: between two steps, layer by layer, plan, exchange over NCCL, wait, copy

Each rank's times count. ``device`` is from a step's boundary to its end on the device, ``host`` from one boundary to
the next on the host's clock, ``boundary`` the host's time inside ``step()``. Ways
alternate within a repetition, ratios are taken within it, and medians over repetitions are shown. A commit's ``excess``
is what its step takes beyond the median idle step and one flat copy of the same bytes, which all ranks make at once, as
they do commits.

Predicted before the first run of the default size: copy engine p50 1.04 and p99 1.10 of idle, NCCL 1.10 and 1.5 with
eager passes, blocking stalls of 0.5 s, an excess of a commit of 0.2 ms.

Needs a CUDA device. Ranks beyond the number of GPUs share them; start MPS first, or they take turns. NCCL then moves
bytes through sockets.
"""

import argparse
import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import (
    CopyEngineTransport,
    EPTopology,
    ExpertMap,
    ExpertPlacement,
    NcclOptions,
    SyncUpdater,
    TorchDistTransport,
    Transport,
)
from async_eplb.testing.processes import World, WorldRank, take_gpu
from async_eplb.testing.sample_model import random_placement
from benchmarks._expert import EXPERT_NBYTES
from benchmarks._serving_modes import Blocking, Experts

_WAYS = ("idle", "again", "ready", "copy_engine", "nccl", "blocking")
_WARM_UP = 30
"""Steps at the beginning that do not count."""
_HIDDEN = 3584
"""Width of the model's products: w13's bytes as 4096 rows of 16-bit numbers."""
_EXCHANGED = 512
"""Columns that go through the all-to-all: sockets carry it where ranks share a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--ranks", type=int, default=4, help="of the world (default: 4)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: 8)")
    parser.add_argument("--slots", type=int, default=9, help="experts of a layer on each rank (default: 9)")
    parser.add_argument("--changed", type=int, default=2, help="slots of a layer that an update fills (default: 2)")
    parser.add_argument("--tokens", type=int, default=128, help="of each rank in a step (default: 128)")
    parser.add_argument("--steps", type=int, default=1000, help="of a run (default: 1000)")
    parser.add_argument("--updates", type=int, default=10, help="one after another, in a run (default: 10)")
    parser.add_argument("--nccl-updates", type=int, default=4, help="the same over NCCL (default: 4)")
    parser.add_argument("--max-ctas", type=int, default=NcclOptions().max_ctas, help="that NCCL may take")
    parser.add_argument("--mb-per-step", type=int, default=10, help="pace of the busiest rank; 0: none (default: 10)")
    parser.add_argument("--eager", action="store_true", help="launch the passes' kernels one by one, without a graph")
    parser.add_argument(
        "--switch-interval-ms",
        type=float,
        default=sys.getswitchinterval() * 1e3,
        help="how long Python lets a thread wait for the others (default: Python's, 5)",
    )
    parser.add_argument("--runs", type=int, default=3, help="repetitions; medians are shown (default: 3)")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=_WAYS, help="what to compare (default: all)")


class Step(NamedTuple):
    """Times of one step in milliseconds, on one rank.

    :param number: of its boundary
    :param updating: whether an update was under way
    """

    number: int
    device_ms: float
    host_ms: float
    boundary_ms: float
    updating: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One run on one rank.

    :param commits: boundary → layers committed there
    :param num_new_segments: blocks that the caching allocator got from the device after the first update
    """

    steps: list[Step]
    commits: dict[int, int]
    num_new_segments: int


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return times in milliseconds, and what they are of those of the idle model."""
    if not torch.cuda.is_available():
        print("scripts/bench gpu-serving needs a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    by_rank = World(options.ranks, timeout_s=3600).run(measure, options)
    repetitions = [_figures(ranks, options) for ranks in zip(*by_rank, strict=True)]
    return {name: median(each[name] for each in repetitions) for name in repetitions[0]}


def _figures(ranks: tuple[dict[str, RankRun | float], ...], options: argparse.Namespace) -> dict[str, float]:
    flat_copy_ms = float(np.mean([rank["flat_copy_ms"] for rank in ranks]))
    figures = {"flat_copy_ms": flat_copy_ms}
    for way in options.ways:
        runs = [rank_run for rank in ranks if isinstance(rank_run := rank[way], RankRun)]
        steps = [step for rank_run in runs for step in rank_run.steps if step.number > _WARM_UP and step.updating]
        for name in ("device_ms", "host_ms"):
            p50, p99 = np.percentile([getattr(step, name) for step in steps], (50, 99)).tolist()
            figures |= {f"{way}_p50_{name}": p50, f"{way}_p99_{name}": p99}
            if way != "idle":
                for figure, value in (("p50", p50), ("p99", p99)):
                    figures[f"{way}_{figure}_{name}_over_idle"] = value / figures[f"idle_{figure}_{name}"]
        figures[f"{way}_longest_device_ms"] = max(step.device_ms for step in steps)
        figures[f"{way}_longest_boundary_ms"] = max(step.boundary_ms for step in steps)
        figures[f"{way}_p99_boundary_ms"] = float(np.percentile([step.boundary_ms for step in steps], 99))
        figures[f"{way}_steps"] = len(steps) / len(runs)
        commits = [(step, n) for each in runs for step in each.steps if (n := each.commits.get(step.number, 0))]
        if commits:
            excess = [step.device_ms - figures["idle_p50_device_ms"] - n * flat_copy_ms for step, n in commits]
            figures |= {f"{way}_commits": len(commits) / len(runs), f"{way}_commit_excess_p50_ms": median(excess)}
            figures[f"{way}_new_segments"] = max(rank_run.num_new_segments for rank_run in runs)
    return figures


def measure(world: WorldRank, options: argparse.Namespace) -> list[dict[str, RankRun | float]]:
    """Be one rank; return each repetition's runs by way."""
    take_gpu(world)
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    sys.setswitchinterval(options.switch_interval_ms / 1e3)
    return _Rank(world, options).measure()


class _Idle:
    """Experts stay.

    :ivar commits: boundary → layers committed there
    :ivar updating: whether steps count at present
    """

    updating = True

    def __init__(self) -> None:
        self.commits: Counter[int] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """When this returns, all experts are where they were before."""

    def step(self, number: int) -> None:
        """Do what is due before a pass."""


class _Blocking(_Idle):
    def __init__(self, experts: Experts, group: ProcessGroup, num_steps: int) -> None:
        super().__init__()
        boundaries = np.linspace(_WARM_UP + 1, num_steps, len(experts.targets), endpoint=False).astype(int)
        expert_map = ExpertMap(experts.placement, experts.topology, rank=experts.rank, device=torch.device("cuda"))
        self._blocking = Blocking(experts, expert_map, group, boundaries.tolist())

    def step(self, number: int) -> None:
        self._blocking.move(number)


class _Ours(_Idle):
    """The library, with a thread that begins one update after another from the end of the warm-up on."""

    def __init__(self, experts: Experts, transport: Transport, options: argparse.Namespace) -> None:
        super().__init__()
        self._updater: SyncUpdater = SyncUpdater(
            experts.weights,
            experts.placement,
            experts.topology,
            rank=experts.rank,
            transport=transport,
            on_commit=lambda _: self.commits.update([self._updater.statistics().step]),
        )
        self._targets = experts.targets
        self._max_nbytes_per_step = options.mb_per_step * 1_000_000 or None
        self._warm = threading.Event()
        self._thread = threading.Thread(target=self._update)
        self.updating = not self._targets

    def __enter__(self) -> Self:
        self._updater.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._warm.set()
        with self._updater.idle():
            self._thread.join()
        self._updater.__exit__(None, None, None)

    def step(self, number: int) -> None:
        self._updater.step(number)
        if number == _WARM_UP:
            self._warm.set()

    def _update(self) -> None:
        self._warm.wait()
        for target in self._targets:
            self.updating = True
            self._updater.begin(target, max_nbytes_per_step=self._max_nbytes_per_step).wait()
        self.updating = not self._targets


class _Rank:
    def __init__(self, world: WorldRank, options: argparse.Namespace) -> None:
        self._options = options
        self._group = self._nccl_group()
        self._moving_group = self._nccl_group()
        self._topology = EPTopology(world.num_ranks, 1, options.slots)
        self._rank = world.rank
        rng = np.random.default_rng(0)
        physical = self._topology.num_physical_experts
        self._placement = random_placement(rng, options.layers, physical, physical)
        self._targets = [self._placement]
        while len(self._targets) <= options.updates:
            self._targets.append(self._drifted(self._targets[-1], rng))
        generator = torch.Generator("cuda").manual_seed(world.rank)
        self._tensors = {
            layer: [
                torch.randint(0, 60, (options.slots, nbytes), dtype=torch.uint8, device="cuda", generator=generator)
                for nbytes in EXPERT_NBYTES
            ]
            for layer in range(options.layers)
        }
        self._tokens = torch.randn(options.tokens, _HIDDEN, device="cuda", dtype=torch.bfloat16) / 64

        self._pass: Callable[[], object] = self._forward if options.eager else self._captured().replay

    def measure(self) -> list[dict[str, RankRun | float]]:
        """Return the repetitions' runs by way."""
        repetitions = []
        for number in range(self._options.runs):
            first = number % len(self._options.ways)
            order = (*self._options.ways[first:], *self._options.ways[:first])
            runs: dict[str, RankRun | float] = {"flat_copy_ms": self._flat_copy_ms()}
            for way in order:
                runs[way] = self._run(way)
            repetitions.append(runs)
        return repetitions

    def _nccl_group(self) -> ProcessGroup:
        group = dist.new_group(backend="nccl")
        assert isinstance(group, ProcessGroup)  # noqa: S101 - this process is a member
        return group

    def _drifted(self, placement: ExpertPlacement, rng: np.random.Generator) -> ExpertPlacement:
        """Let some slots of each rank trade their experts with those of the next ranks."""
        rows = []
        shape = (self._topology.num_ranks, self._topology.num_local_physical_experts)
        for row in placement.physical_to_logical_map:
            slots = row.reshape(shape).copy()
            chosen = np.stack([rng.permutation(shape[1])[: self._options.changed] for _ in range(shape[0])])
            moved = np.take_along_axis(slots, chosen, 1)
            np.put_along_axis(slots, chosen, np.roll(moved, int(rng.integers(1, shape[0])), axis=0), 1)
            rows.append(slots.reshape(-1))
        return ExpertPlacement.from_mapping(rows)

    def _way(self, way: str) -> "_Idle":
        options = self._options
        num_updates = {"copy_engine": options.updates, "nccl": options.nccl_updates, "blocking": 4}.get(way, 0)
        there = self._targets[1 : num_updates // 2 + 1]
        and_back = [*there, *there[-2::-1], self._placement] if there else []
        experts = Experts(self._tensors, self._placement, and_back, self._topology, self._rank)
        match way:
            case "copy_engine" | "ready":
                return _Ours(experts, CopyEngineTransport(), options)
            case "nccl":
                return _Ours(experts, TorchDistTransport(nccl=NcclOptions(max_ctas=options.max_ctas)), options)
            case "blocking":
                return _Blocking(experts, self._moving_group, options.steps)
        return _Idle()

    def _run(self, name: str) -> RankRun:
        way = self._way(name)
        gc.collect()
        gc.disable()
        marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        times: list[tuple[float, float, bool]] = []
        segments = 0
        torch.cuda.synchronize()
        dist.barrier()
        with way:
            for number in range(1, self._options.steps + 1):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start = time.perf_counter()
                begin.record()
                way.step(number)
                passed = time.perf_counter()
                self._pass()
                end.record()
                end.synchronize()
                times.append((time.perf_counter() - start, passed - start, way.updating))
                marks.append((begin, end))
                if number == self._options.steps // 3:
                    segments = torch.cuda.memory_stats()["segment.all.allocated"]
            new_segments = torch.cuda.memory_stats()["segment.all.allocated"] - segments
        gc.enable()
        return RankRun(
            steps=[
                Step(number, begin.elapsed_time(end), host_s * 1e3, boundary_s * 1e3, updating)
                for number, ((begin, end), (host_s, boundary_s, updating)) in enumerate(
                    zip(marks, times, strict=True), 1
                )
            ],
            commits=dict(way.commits),
            num_new_segments=new_segments,
        )

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return the graph of a pass; the first passes have made all that NCCL and the allocator need."""
        for _ in range(3):
            self._forward()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._forward()
        return graph

    @torch.no_grad()
    def _forward(self) -> Tensor:
        hidden = self._tokens
        for tensors in self._tensors.values():
            w13 = tensors[0].view(torch.bfloat16).view(self._options.slots, -1, _HIDDEN)
            for slot in range(2):
                hidden = (hidden @ w13[slot].T)[:, :_HIDDEN]
                hidden[:, :_EXCHANGED] = self._exchanged(hidden[:, :_EXCHANGED].contiguous())
        return hidden

    def _exchanged(self, data: Tensor) -> Tensor:
        out = torch.empty_like(data)
        dist.all_to_all_single(out, data, group=self._group)
        return out

    def _flat_copy_ms(self) -> float:
        """Return the time of one flat copy of what a layer's commit copies, made by all ranks at once."""
        nbytes = self._options.changed * sum(EXPERT_NBYTES)
        source, target = torch.zeros(2, nbytes, dtype=torch.uint8, device="cuda")
        times: list[float] = []
        for _ in range(10):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            dist.barrier()
            for mark in marks:
                mark.record()
                target.copy_(source)
            torch.cuda.synchronize()
            times += [one.elapsed_time(next_) for one, next_ in pairwise(marks)]
        return median(times)
