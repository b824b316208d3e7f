"""The demo: real processes move a model's expert weights, then check every byte."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch

from async_eplb.cli.numbers import natural, positive
from async_eplb.cli.render import print_table, progress
from async_eplb.errors import InvalidOptions, InvalidPlacement, InvalidTopology
from async_eplb.events.emit import Logger
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.json_log import JsonLog
from async_eplb.events.stages import STAGES
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import SlotSource
from async_eplb.report.text import in_bytes
from async_eplb.testing.processes import World, WorldRank, take_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.topology import EPTopology
from async_eplb.transport.torch_dist.transport import Backend, TorchDistTransport
from async_eplb.update.summary import UpdateSummary
from async_eplb.updater import ExpertUpdater
from async_eplb.weights import ExpertWeights

_BARS = {stage.event.name: stage.event.name.rpartition(".")[2] for stage in STAGES}
"""Event of a layer → label of the progress bar that it advances: ``planned``, ``transferred``, ``committed``."""

_SOURCES = {
    SlotSource.SAME_GPU: "from the same GPU",
    SlotSource.FREE_RIDER: "received once for several slots",
    SlotSource.SAME_NODE: "from the same node",
    SlotSource.CROSS_NODE: "from another node",
}

_SHAPE = ("ranks", "layers", "experts", "replicas")
"""Options that ask for a random placement; without them it is the published one."""

_DESCRIPTION = """\
Start one process for each rank, give each its part of a model's expert weights, move these to a
new placement layer by layer, and compare every byte of every slot with what it must be.

Before the move, physical expert i holds logical expert i modulo their number. The new placement
is the example that DeepSeek published with its load balancer (2 layers, 12 experts, 16 replicas,
8 ranks), unless --placement names a file, or one of --ranks, --layers, --experts and --replicas
asks for a random one.

Exit status: 0 if every byte is right, 1 if one is not, 2 if the options do not fit together.
"""

_EPILOG = """\
examples:
  async_eplb demo                                     the published example
  async_eplb demo --nodes 4                           the same, as if on 4 nodes
  async_eplb demo --ranks 8 --experts 64 --layers 20  a random placement of 96 replicas
  async_eplb demo --placement new.json --ranks 4      your engine's placement
  async_eplb demo --log-dir logs                      and what each rank logged
"""


@dataclass(frozen=True, slots=True)
class Job:
    """Weights and placements of the demo."""

    topology: EPTopology
    old: ExpertPlacement
    new: ExpertPlacement
    model: SampleModel
    backend: Backend
    log_dir: Path | None


@dataclass(frozen=True, slots=True)
class RankResult:
    """Result of one rank."""

    summary: UpdateSummary
    wrong_slots: list[tuple[int, int]]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="move expert weights between real processes and check every byte",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="processes, one for each GPU of the EP group (default: 4)"
    )
    parser.add_argument(
        "--nodes",
        type=positive,
        metavar="N",
        help="pretend nodes that the ranks are on (default: 2; 1 if ranks are odd)",
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="MoE layers (default: 8)")
    parser.add_argument("--experts", type=positive, metavar="N", help="logical experts of each layer (default: 16)")
    parser.add_argument(
        "--replicas", type=positive, metavar="N", help="physical experts of each layer (default: 1.5 for each expert)"
    )
    parser.add_argument(
        "--placement",
        metavar="FILE",
        help="placement to move to: .json or .pt with physical_to_logical_map [layers, physical experts], as serving "
        "engines write it; layers, experts and replicas are the file's",
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of weights and placement (default: 0)")
    parser.add_argument(
        "--backend",
        choices=("auto", "gloo", "nccl"),
        default="auto",
        help="gloo moves CPU memory, nccl GPU memory; auto: nccl if there is a GPU for each rank (default: auto)",
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write each rank's events there, as JSON lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its figures."""
    job = _job(options)
    if job.log_dir is not None:
        _make(job.log_dir)
    num_ranks = job.topology.num_ranks
    num_layers = len(job.new.changed_layers(job.old))
    totals = dict.fromkeys(_BARS.values(), num_layers * num_ranks)
    with progress(totals) as advance:
        world = World(num_ranks, on_message=lambda _rank, message: advance(str(message)))
        results = world.run(move_and_check, job)
    print_table(_title(job), list(_rows(job, results)))
    wrong = [(rank, *slot) for rank, result in enumerate(results) for slot in result.wrong_slots]
    if wrong:
        print(f"WRONG: {len(wrong)} slots do not hold their expert; (rank, layer, slot): {wrong[:10]}")
        return 1
    nbytes = job.model.expert_nbytes() * int((job.new.physical_to_logical_map >= 0).sum())
    print(f"Every byte of every slot on every rank is right ({in_bytes(nbytes)} compared).")
    return 0


def move_and_check(world: WorldRank, job: Job) -> RankResult:
    """Move the weights as one rank, then compare every slot with its expected contents."""
    device = torch.device("cpu")
    if job.backend == "nccl":
        device = take_gpu(world)
    tensors = job.model.weights(job.old, job.topology, world.rank, device)
    with ExitStack() as stack:
        logger = _logger(world, job.log_dir, stack)
        summary = anyio.run(_move, world.rank, job, ExpertWeights(tensors), logger)
    return RankResult(summary, job.model.wrong_slots(tensors, job.new, job.topology, world.rank))


async def _move(rank: int, job: Job, weights: ExpertWeights, logger: Logger) -> UpdateSummary:
    updater = ExpertUpdater(
        weights,
        job.old,
        job.topology,
        rank=rank,
        transport=TorchDistTransport(backend=job.backend),
        options=UpdateOptions(verify="checksum", log_inputs=True, log_decisions=True),
        logger=logger,
    )
    async with updater:
        return await updater.update(job.new)


def _logger(world: WorldRank, log_dir: Path | None, stack: ExitStack) -> Logger:
    """Return a logger that reports each stage to the parent process, and writes events to a folder if one is given."""
    path = os.devnull if log_dir is None else log_dir / f"rank-{world.rank}.jsonl"
    log = stack.enter_context(JsonLog(path, level="debug"))

    def advance_parent(event: Mapping[str, Any]) -> None:
        if event["event"] in _BARS:
            world.send(_BARS[event["event"]])

    return EventLogger(log.logger(), observers=[advance_parent])


def _job(options: argparse.Namespace) -> Job:
    model = SampleModel(seed=options.seed)
    published = options.placement is None and all(getattr(options, name) is None for name in _SHAPE)
    new = _published_target() if published else _own_target(options)
    num_ranks = options.ranks or (8 if published else 4)
    num_nodes = options.nodes or (1 if num_ranks % 2 else 2)
    topology = EPTopology.for_physical_experts(new.num_physical_experts, num_ranks=num_ranks, num_nodes=num_nodes)
    if new.unplaced():
        raise InvalidPlacement(f"the placement leaves logical experts without a replica: {new.unplaced()}")
    old = ExpertPlacement.trivial(new.num_layers, new.num_physical_experts, new.num_logical_experts)
    return Job(topology, old, new, model, _backend(options.backend, num_ranks), options.log_dir)


def _published_target() -> ExpertPlacement:
    example = files("async_eplb").joinpath("data/deepseek_example.json").read_text()
    return ExpertPlacement.load(example)


def _own_target(options: argparse.Namespace) -> ExpertPlacement:
    if options.placement is not None:
        return _target_of_file(options)
    num_ranks = options.ranks or 4
    num_experts = options.experts or 16
    num_replicas = options.replicas or -(-num_experts * 3 // (2 * num_ranks)) * num_ranks
    if num_replicas < num_experts:
        raise InvalidTopology(f"{num_replicas} replicas are too few: each of the {num_experts} experts needs one")
    return random_placement(np.random.default_rng(options.seed), options.layers or 8, num_replicas, num_experts)


def _target_of_file(options: argparse.Namespace) -> ExpertPlacement:
    placement = ExpertPlacement.load(options.placement)
    for name, held in (
        ("layers", placement.num_layers),
        ("experts", placement.num_logical_experts),
        ("replicas", placement.num_physical_experts),
    ):
        asked = getattr(options, name)
        if asked not in (None, held):
            raise InvalidOptions(
                f"--{name} is {asked}, but the placement has {held} {name}; leave --{name} out", option=name
            )
    return placement


def _make(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOptions(f"--log-dir {log_dir} cannot be made: {error.strerror}", option="log_dir") from error


def _backend(choice: str, num_ranks: int) -> Backend:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "nccl" and num_gpus == 0:
        raise InvalidTopology("--backend nccl needs a GPU, and torch sees none here; use --backend gloo")
    if choice == "auto":
        return "nccl" if num_gpus >= num_ranks else "gloo"
    return "nccl" if choice == "nccl" else "gloo"


def _title(job: Job) -> str:
    topology = job.topology
    return (
        f"{job.old.num_logical_experts} experts in {topology.num_physical_experts} slots, {topology.num_ranks} ranks "
        f"on {topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''}, {job.backend}"
    )


def _rows(job: Job, results: list[RankResult]) -> Iterable[tuple[str, str]]:
    summaries = [result.summary for result in results]
    first = summaries[0]
    yield "layers", f"{len(first.layers)} moved, {first.num_unchanged_layers} unchanged"
    by_source: Counter[SlotSource] = Counter()
    for summary in summaries:
        by_source.update(summary.nbytes_by_source)
    for source, label in _SOURCES.items():
        yield f"bytes {label}", in_bytes(by_source[source])
    yield "bytes sent within nodes", in_bytes(sum(s.sent_nbytes_within_node for s in summaries))
    yield "bytes sent across nodes", in_bytes(sum(s.sent_nbytes_across_nodes for s in summaries))
    for stage in STAGES:
        times = [getattr(summary, stage.total) for summary in summaries]
        yield f"{stage.label} time", f"{max(times):.1f} ms (slowest rank, all layers)"
    yield "duration", f"{max(s.duration_ms for s in summaries):.1f} ms"
    yield "overlap", f"{max(s.overlap for s in summaries):.2f} (stage time over duration)"
    wrong = sum(len(result.wrong_slots) for result in results)
    yield "verdict", "right" if wrong == 0 else f"{wrong} of {job.new.physical_to_logical_map.size} slots wrong"
