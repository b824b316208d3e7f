"""What serving loses while experts move: one server's step times and longest stall, with four ways of moving them.

The server of ``examples/serving`` without its front, four ranks over gloo, the same requests every time. Four times in
a run, all layers get a new placement; an expert is ``--expert-kb`` large, most of which the small model does not read.

- ``none``: experts stay
- ``ours``: the library, beside serving
- ``blocking``: what engines do: between two passes, layer by layer, plan, exchange, wait, copy
- ``scratch``: the exchanges of ``ours`` at the same pace, into memory that nobody reads: what the bytes alone cost on
  this machine's cores

A step is a forward pass with what happens before it, on the slowest rank. A stall is the longest time at one boundary:
inside ``step()``, or inside the update call of ``blocking``. Ways alternate within a repetition, and ratios are taken
within it; medians over repetitions are shown. Every answer and every byte is compared.

Predicted before the first run of the default size, from one of 2 layers and 60 passes: steps of 55 ms (p50); stalls of
170 ms (blocking) and 3 ms (ours), so 55 times shorter; p99 of ours 1.15 times that of scratch.
"""

import argparse
import gc
from dataclasses import dataclass
from itertools import count
from statistics import median

import anyio
import numpy as np
import torch
import torch.distributed as dist

from async_eplb import ExpertMap
from async_eplb.load.window import LoadWindow
from async_eplb.testing.processes import World, WorldRank
from async_eplb.testing.sample_model import random_placement
from benchmarks._serving_modes import Background, Blocking, Experts, IntoScratch, Mode, Pace
from serving.checkpoint import local_experts
from serving.config import EngineConfig, ModelConfig, ServingConfig
from serving.engine import Engine
from serving.model import MoEModel
from serving.sequences import Request

_NUM_RANKS = 4
_WAYS = ("none", "ours", "blocking", "scratch")
_WARM_UP = 10
"""Passes at the beginning that do not count."""
_PROMPT = 4
_ANSWER = 96
_ENGINE = EngineConfig(max_batch=8, max_pass_tokens=64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: 8)")
    parser.add_argument("--expert-kb", type=int, default=512, help="of one expert of one layer (default: 512)")
    parser.add_argument("--passes", type=int, default=320, help="forward passes of a run (default: 320)")
    parser.add_argument("--updates", type=int, default=4, help="of all layers, in a run (default: 4)")
    parser.add_argument("--passes-per-layer", type=int, default=8, help="pace of the transfers (default: 8)")
    parser.add_argument("--runs", type=int, default=3, help="repetitions; medians are shown (default: 3)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRun:
    """One run on one rank.

    :param step_ms: at each boundary
    :param pass_ms: from each boundary to the next
    :param answers: tokens by request
    :param num_updates: that were over when the last pass was
    """

    step_ms: list[float]
    pass_ms: list[float]
    answers: dict[int, list[int]]
    num_updates: int
    num_fence_waits: int


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return step times and stalls in milliseconds, and what they are of each other."""
    by_rank = World(_NUM_RANKS, timeout_s=3600).run(measure, options)
    _require_same_answers(by_rank)
    repetitions = [
        {way: _figures([rank[way] for rank in ranks]) for way in _WAYS} for ranks in zip(*by_rank, strict=True)
    ]
    figures = {
        f"{way}_{name}": median(repetition[way][name] for repetition in repetitions)
        for way in _WAYS
        for name in repetitions[0][way]
    }

    def ratio(of: tuple[str, str], to: tuple[str, str]) -> float:
        return median(r[of[0]][of[1]] / r[to[0]][to[1]] for r in repetitions)

    return figures | {
        "ours_p99_over_scratch_p99": ratio(("ours", "p99_ms"), ("scratch", "p99_ms")),
        "ours_p99_over_none_p99": ratio(("ours", "p99_ms"), ("none", "p99_ms")),
        "blocking_stall_over_ours_stall": ratio(("blocking", "stall_ms"), ("ours", "stall_ms")),
        "ours_updates_within_passes": median(r["ours"].num_updates for r in by_rank[0]),
        "ours_fence_waits": median(
            sum(rank[n]["ours"].num_fence_waits for rank in by_rank) for n in range(options.runs)
        ),
    }


def _require_same_answers(by_rank: list[list[dict[str, RankRun]]]) -> None:
    for rank, repetitions in enumerate(by_rank):
        expected = repetitions[0]["none"].answers
        for repetition in repetitions:
            wrong = [way for way, rank_run in repetition.items() if rank_run.answers != expected]
            if wrong:
                raise RuntimeError(f"rank {rank}: answers of {', '.join(wrong)} are not those of experts that stay")


def _figures(ranks: list[RankRun]) -> dict[str, float]:
    """Return the times of one run: of each pass on the slowest rank, and the longest at one boundary."""
    passes = np.max([rank.pass_ms[_WARM_UP:] for rank in ranks], axis=0)
    p50, p99 = np.percentile(passes, (50, 99)).tolist()
    stall = np.max([rank.step_ms[_WARM_UP:] for rank in ranks])
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": float(passes.max()), "stall_ms": float(stall)}


def measure(world: WorldRank, options: argparse.Namespace) -> list[dict[str, RankRun]]:
    """Be one rank; return each repetition's runs by way."""
    return anyio.run(_Rank(world, options).measure)


class _Rank:
    """One rank and its experts, which are at the end of each run where they were before."""

    def __init__(self, world: WorldRank, options: argparse.Namespace) -> None:
        self.options = options
        group = dist.group.WORLD
        assert group is not None  # noqa: S101 - run_world has made it
        self.group = group
        self.moving_group = dist.new_group()
        model = ModelConfig(num_layers=options.layers)
        self.config = ServingConfig(model=model, engine=_ENGINE)
        topology = self.config.topology(world.num_ranks)
        rng = np.random.default_rng(0)
        placements = [
            random_placement(rng, model.num_layers, topology.num_physical_experts, model.num_logical_experts)
            for _ in range(options.updates)
        ]
        self.read = local_experts(model, placements[0], topology, world.rank)
        held = placements[0].physical_to_logical_map[:, topology.slots_of(world.rank)]
        unread = options.expert_kb * 1024 - sum(tensor[0].nbytes for tensor in self.read[0])
        tensors = {
            layer: [*read, torch.tensor(row, dtype=torch.uint8)[:, None].repeat(1, unread)]
            for (layer, read), row in zip(self.read.items(), held, strict=True)
        }
        self.experts = Experts(tensors, placements[0], (*placements[1:], placements[0]), topology, world.rank)
        self.before = {layer: [tensor.clone() for tensor in row] for layer, row in tensors.items()}

    async def measure(self) -> list[dict[str, RankRun]]:
        repetitions = []
        for number in range(self.options.runs):
            first = number % len(_WAYS)
            order = (*_WAYS[first:], *_WAYS[:first])
            runs = {way: await self._run(self._mode(way)) for way in order}
            repetitions.append(runs)
        return repetitions

    def _mode(self, way: str) -> Mode:
        experts, options = self.experts, self.options
        expert_map = ExpertMap(experts.placement, experts.topology, rank=experts.rank)
        peaks = [
            experts.peak_nbytes(layer, old, new) for old, new in experts.moves for layer in new.changed_layers(old)
        ]
        pace = Pace(_WARM_UP, round(float(np.mean(peaks)) / options.passes_per_layer), options.passes_per_layer)
        if way == "ours":
            return Background(experts, self.group, pace)
        if way == "scratch":
            return IntoScratch(experts, expert_map, self.group, pace)
        if way == "blocking":
            boundaries = np.linspace(_WARM_UP + 1, options.passes, options.updates, endpoint=False).astype(int)
            return Blocking(experts, expert_map, self.moving_group, boundaries.tolist())
        return Mode(experts, expert_map)

    async def _run(self, mode: Mode) -> RankRun:
        window = LoadWindow(self.config.model.num_layers, self.config.model.num_logical_experts, 40)
        model = MoEModel(self.config, self.read, mode.expert_map, self.group, window)
        engine = Engine(model, mode, self.group, _ENGINE)
        streams = {request.number: engine.submit(request) for request in self._requests()}
        engine.stop()
        gc.collect()
        async with mode.active():
            await engine.run()
            statistics = mode.statistics()
        answers = {}
        for number, stream in streams.items():
            with stream:
                answers[number] = [token async for token in stream]
        self._require_unmoved()
        records = list(engine.log.records)
        return RankRun(
            step_ms=[record.step_ms for record in records],
            pass_ms=[record.pass_ms for record in records],
            answers=answers,
            num_updates=statistics.num_updates_finished if statistics else 0,
            num_fence_waits=statistics.num_fence_waits if statistics else 0,
        )

    def _requests(self) -> list[Request]:
        """Return requests that fill every pass, of which a rank begins one at a time after the first."""
        spans = []
        for place in range(_ENGINE.max_batch):
            start, end = 0, _ANSWER * (place + 1) // _ENGINE.max_batch
            while start < self.options.passes:
                end = min(end, self.options.passes)
                spans.append((start, end))
                start, end = end, end + _ANSWER
        rng = np.random.default_rng(self.experts.rank)
        numbers = count(self.experts.rank * 10_000)
        return [
            Request(
                number=next(numbers),
                prompt=tuple(rng.integers(0, self.config.model.vocabulary, _PROMPT).tolist()),
                max_tokens=end - start,
            )
            for start, end in sorted(spans)
        ]

    def _require_unmoved(self) -> None:
        """Check that after the last update every byte is where it was before the first."""
        for layer, tensors in self.experts.tensors.items():
            if not all(torch.equal(*pair) for pair in zip(tensors, self.before[layer], strict=True)):
                raise RuntimeError(f"rank {self.experts.rank}: experts of layer {layer} are not what they were")
