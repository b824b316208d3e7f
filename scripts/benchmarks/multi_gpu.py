"""What the GPUs of one host do with expert weights: links, whole updates over each transport, serving beside them.

- ``links``: one tensor from a rank to another, pair by pair and all ranks at once (each sends to the next, then each to
  all), by the driver's copies through CUDA IPC (``ipc``), by NCCL as it likes (``nccl``) and with few thread blocks
  (``nccl_few``)
- ``update``: all layers go to another placement, that of a full replan or the ``Incremental`` policy's after loads have
  drifted, over each transport, exclusively. Layers are DeepSeek-V3's in FP8, with 32 redundant experts: 288 of 44 MB.
  GB/s are what the rank that receives most receives in the whole time; ratios are to the same ranks' flat tensors, all
  at once, to the link's limit, and for NCCL to bare batches of the same messages (``over_batch``), posted one after
  another with nothing else to do. ``nccl`` has as many thread blocks as beside serving, ``nccl_wide`` 32
- ``trace``: what the device did in one update over the copy engine: copies (a batch of the driver's counts once) and
  kernels, and GB/s in the time in which any copy from a peer is under way
- ``serving``: ``scripts/bench gpu-serving`` with these ranks, and as many layers as DeepSeek-V3 has
- ``soak``: passes with updates beside them, as the tests make them, over each transport

Every byte is compared after each part. With fewer GPUs than ranks, ranks share them and NCCL takes them for hosts of
their own: that tries the script, and its figures say nothing about links. Start MPS first.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from async_eplb import (
    CopyEngineTransport,
    EPTopology,
    ExpertLoad,
    ExpertPlacement,
    ExpertWeights,
    NcclOptions,
    SyncUpdater,
    Transport,
    UpdateOptions,
)
from async_eplb.device import CudaDevice
from async_eplb.plan.posting import PostedUpdate
from async_eplb.plan.update import plan_update
from async_eplb.policy import Hierarchical, Incremental
from async_eplb.simulate.models import MODELS
from async_eplb.staging import StagingBuffer, StagingPool
from async_eplb.testing.processes import World, WorldRank, take_gpu
from async_eplb.transport import TRANSPORTS, TransportOptions
from async_eplb.transport.copy_engine.cuda_ipc import Copies, CudaIpc, Step
from benchmarks import gpu_serving
from benchmarks._expert import EXPERT_NBYTES

_WIDE = 32
"""Thread blocks of NCCL when nobody serves: as many as it takes by itself for a peer on NVLink."""
_TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "nccl": lambda: TRANSPORTS["dist"](TransportOptions()),
    "nccl_wide": lambda: TRANSPORTS["dist"](TransportOptions(nccl=NcclOptions(max_ctas=_WIDE))),
    "copy_engine": lambda: TRANSPORTS["copy"](TransportOptions()),
    "hybrid": lambda: TRANSPORTS["hybrid"](TransportOptions()),
}
_MAX_CTAS = {"nccl": NcclOptions().max_ctas, "nccl_wide": _WIDE}
_RAW = {"nccl": "nccl_few", "nccl_wide": "nccl", "copy_engine": "ipc", "hybrid": "ipc"}
_DRIFT = 0.5
"""Standard deviation of the logarithm of what each expert's load is multiplied by."""
_NUM_PHYSICAL_EXPERTS = 288
_MOST_LAYERS = MODELS["deepseek-v3"].num_layers
_MEMORY_SHARE = 0.85

Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--ranks", type=int, help="of the world (default: the GPUs, or 4 if there is one)")
    parser.add_argument("--layers", type=int, help=f"of the model (default: what fits, {_MOST_LAYERS} at most)")
    parser.add_argument(
        "--slots", type=int, help=f"experts of a layer on each rank (default: its share of {_NUM_PHYSICAL_EXPERTS})"
    )
    parser.add_argument(
        "--staging-depth",
        type=int,
        default=3,
        help="layers at once in staging: one is received, one commits, one is ready (default: 3)",
    )
    parser.add_argument("--link-mb", type=int, default=1024, help="of a tensor that links carry (default: 1024)")
    parser.add_argument("--nccl-link-mb", type=int, default=1024, help="the same over NCCL (default: 1024)")
    parser.add_argument(
        "--link-gb-per-s",
        type=float,
        default=450,
        help="limit of a GPU's links in one direction (default: 450, NVLink 4 with 18 links)",
    )
    parser.add_argument("--runs", type=int, default=5, help="of each; medians are shown (default: 5)")
    parser.add_argument("--soak-updates", type=int, default=400, help="of each soak (default: 400, two minutes)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the profiler's trace of rank 0 there")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to measure")


def run(options: argparse.Namespace) -> Figures:
    """Return figures of all parts."""
    if not torch.cuda.is_available():
        print("scripts/bench multi-gpu needs a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    num_gpus = torch.cuda.device_count()
    options.ranks = options.ranks or (num_gpus if num_gpus > 1 else 4)
    options.slots = options.slots or _NUM_PHYSICAL_EXPERTS // options.ranks
    options.layers = options.layers or _fitting_layers(options)
    figures: Figures = {
        "num_gpus": num_gpus,
        "num_ranks": options.ranks,
        "num_layers": options.layers,
        "num_slots": options.slots,
    }
    for part in options.parts:
        start = time.perf_counter()
        figures |= {f"{part}_{name}": value for name, value in _PARTS[part](options).items()}
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if {"trace_gb_per_s_while_pulling", "links_ipc_to_all_gb_per_s"} <= set(figures):
        figures["trace_while_pulling_over_raw"] = (
            figures["trace_gb_per_s_while_pulling"] / figures["links_ipc_to_all_gb_per_s"]
        )
    for transport, raw in _RAW.items():
        for kind in ("full", "incremental"):
            update, bare = f"update_{transport}_{kind}_gb_per_s", f"links_{raw}_to_all_gb_per_s"
            if update in figures and bare in figures:
                figures[f"update_{transport}_{kind}_over_raw"] = figures[update] / figures[bare]
            if update in figures:
                figures[f"update_{transport}_{kind}_over_limit"] = figures[update] / options.link_gb_per_s
        if f"update_{transport}_batch_ms" in figures:
            batch_ms, full_ms = (figures[f"update_{transport}_{what}_ms"] for what in ("batch", "full"))
            figures[f"update_{transport}_full_over_batch"] = batch_ms / full_ms
    return figures


def _fitting_layers(options: argparse.Namespace) -> int:
    """Return how many layers fit beside staging that holds all slots of each of its layers."""
    nbytes: float = torch.cuda.get_device_properties(0).total_memory * _MEMORY_SHARE
    ranks_of_a_gpu = -(-options.ranks // torch.cuda.device_count())
    num_layers: int = int(nbytes / ranks_of_a_gpu / options.slots / sum(EXPERT_NBYTES)) - options.staging_depth
    if num_layers < 1:
        raise SystemExit(f"no layer fits with {ranks_of_a_gpu} ranks on a GPU: use fewer --slots than {options.slots}")
    return min(num_layers, _MOST_LAYERS)


def be_rank(world: WorldRank) -> torch.device:
    """Take a GPU and a stream."""
    device = take_gpu(world)
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    return device


# --- Links


def _links(options: argparse.Namespace) -> Figures:
    return World(options.ranks, timeout_s=600).run(measure_links, options)[0]


def measure_links(world: WorldRank, options: argparse.Namespace) -> Figures:
    """Be one rank; return the same figures on all."""
    device = be_rank(world)
    figures: Figures = {}
    ranks = range(world.num_ranks)
    ways = (
        ("ipc", _ipc, options.link_mb),
        ("nccl", partial(_nccl, max_ctas=None), options.nccl_link_mb),
        ("nccl_few", partial(_nccl, max_ctas=NcclOptions().max_ctas), options.nccl_link_mb),
    )
    for name, make, size_mb in ways:
        nbytes = size_mb * 1_000_000 // world.num_ranks * world.num_ranks
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        copy = make(world, torch.full_like(target, world.rank), target)
        pairs = [(src, dst) for src in ranks for dst in ranks if src != dst]
        speeds = [_speed(copy, [pair], nbytes, options.runs) for pair in pairs]
        figures |= {
            f"{name}_slowest_pair_gb_per_s": min(speeds),
            f"{name}_median_pair_gb_per_s": median(speeds),
            f"{name}_fastest_pair_gb_per_s": max(speeds),
        }
        ring = [(rank, (rank + 1) % world.num_ranks) for rank in ranks]
        figures[f"{name}_ring_gb_per_s"] = _speed(copy, ring, nbytes, options.runs)
        share = nbytes // world.num_ranks
        figures[f"{name}_to_all_gb_per_s"] = _speed(copy, pairs, share, options.runs) * (world.num_ranks - 1)
        for received, src in zip(target.view(-1, share), (rank for rank in ranks if rank != world.rank), strict=False):
            if not (received == src).all():
                raise RuntimeError(f"rank {world.rank} did not receive what rank {src} sent over {name}")
    return figures


_Copy = Callable[[Sequence[tuple[int, int]], int], None]
"""Copies so many bytes for each pair of ranks, all pairs at once."""


def _speed(copy: _Copy, pairs: Sequence[tuple[int, int]], nbytes: int, runs: int) -> float:
    """Return GB/s of one pair while all are under way, as the slowest rank sees it."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        copy(pairs, nbytes)
        torch.cuda.synchronize()
        seconds = torch.tensor([time.perf_counter() - start])
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        times.append(float(seconds))
    return nbytes / median(times[1:]) / 1e9


def _ipc(world: WorldRank, source: Tensor, target: Tensor) -> _Copy:
    memory = CudaIpc(target.device)
    base, handle = memory.export(source.data_ptr())
    shared: list[tuple[bytes, int]] = [(b"", 0)] * world.num_ranks
    dist.all_gather_object(shared, (handle, source.data_ptr() - base))
    peers = {rank: memory.open(handle) + offset for rank, (handle, offset) in enumerate(shared) if rank != world.rank}

    def copy(pairs: Sequence[tuple[int, int]], nbytes: int, _read_by_peers: Tensor = source) -> None:
        sources = [*enumerate(src for src, dst in pairs if dst == world.rank)]
        sources.sort(key=lambda source: (source[1] - world.rank) % world.num_ranks)
        copies = (Copies.of([(target.data_ptr() + i * nbytes, peers[src], nbytes)]) for i, src in sources)
        memory.copy([Step(each) for each in copies])

    return copy


def _nccl(world: WorldRank, source: Tensor, target: Tensor, *, max_ctas: int | None) -> _Copy:
    group = _nccl_group(world, max_ctas)

    def copy(pairs: Sequence[tuple[int, int]], nbytes: int) -> None:
        sends = [dist.P2POp(dist.isend, source[:nbytes], dst, group) for src, dst in pairs if src == world.rank]
        recvs = [
            dist.P2POp(dist.irecv, target[index * nbytes : (index + 1) * nbytes], src, group)
            for index, src in enumerate(src for src, dst in pairs if dst == world.rank)
        ]
        _post([*sends, *recvs])

    return copy


def _nccl_group(world: WorldRank, max_ctas: int | None) -> dist.ProcessGroup:
    """Return a group whose ranks are connected."""
    settings = dist.ProcessGroupNCCL.Options()
    if max_ctas is not None:
        settings.config.max_ctas = max_ctas
    group: dist.ProcessGroup = dist.new_group(backend="nccl", pg_options=settings)
    byte = torch.zeros(1, dtype=torch.uint8, device=f"cuda:{torch.cuda.current_device()}")
    others = [rank for rank in range(world.num_ranks) if rank != world.rank]
    _post([dist.P2POp(function, byte, peer, group) for function in (dist.isend, dist.irecv) for peer in others])
    torch.cuda.synchronize()
    return group


def _post(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


# --- Updates


def _updates(options: argparse.Namespace) -> Figures:
    figures: Figures = {}
    for transport in _TRANSPORTS:
        ranks = World(options.ranks, timeout_s=600).run(measure_updates, options, transport)
        figures |= {name: max(rank[name] for rank in ranks) for name in ranks[0] if name.endswith("_ms")}
        for kind in ("full", "incremental"):
            received = max(rank[f"{transport}_{kind}_received_mb"] for rank in ranks)
            ms = figures[f"{transport}_{kind}_ms"]
            figures |= {
                f"{transport}_{kind}_received_mb": received,
                f"{transport}_{kind}_ms_per_layer": ms / options.layers,
                f"{transport}_{kind}_gb_per_s": received / ms,
            }
    return figures


def measure_updates(world: WorldRank, options: argparse.Namespace, transport: str) -> Figures:
    """Be one rank; return times of updates there and back, and what they receive."""
    experts = _Experts(world, options)
    gc.collect()
    gc.freeze()  # as engines do before they serve
    figures: Figures = {}
    with experts.updater(_TRANSPORTS[transport]()) as updater:
        for kind, target in experts.targets.items():
            times, received = [], 0
            for _ in range(options.runs):
                for placement in (target, experts.placement):
                    dist.barrier()
                    start = time.perf_counter()
                    summary = updater.update(placement)
                    if placement is target:
                        times.append((time.perf_counter() - start) * 1e3)
                        received = summary.received_nbytes_within_node + summary.received_nbytes_across_nodes
                    experts.require(placement)
            figures |= {f"{transport}_{kind}_ms": median(times), f"{transport}_{kind}_received_mb": received / 1e6}
    if transport in _MAX_CTAS:
        figures[f"{transport}_batch_ms"] = experts.batch_ms(world, _MAX_CTAS[transport], options.runs)
    return figures


class _Experts:
    """One rank's experts, whose every byte is known from layer and expert."""

    def __init__(self, world: WorldRank, options: argparse.Namespace) -> None:
        self._device = be_rank(world)
        self._rank = world.rank
        self._options = UpdateOptions(staging_depth=options.staging_depth)
        self._topology = EPTopology(world.num_ranks, 1, options.slots)
        physical = self._topology.num_physical_experts
        rng = np.random.default_rng(0)
        before = rng.gamma(1.0, size=(options.layers, physical * 8 // 9)) * 1000
        after = before * np.exp(_DRIFT * rng.standard_normal(before.shape))
        self.placement = Hierarchical(1).place(ExpertLoad.from_counts(before), self._topology)
        drifted = ExpertLoad.from_counts(after)
        self.targets = {
            "full": Hierarchical(1).place(drifted, self._topology),
            "incremental": Incremental()(drifted, self.placement, self._topology),
        }
        generator = torch.Generator().manual_seed(0)
        self._bytes = [
            torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).to(self._device)
            for nbytes in EXPERT_NBYTES
        ]
        self.tensors = {
            layer: [torch.stack([self._content(layer, int(expert), each) for expert in row]) for each in self._bytes]
            for layer, row in enumerate(self._held(self.placement))
        }
        torch.cuda.synchronize()

    def updater(self, transport: Transport) -> SyncUpdater:
        """Return an updater of the live weights."""
        return SyncUpdater(
            ExpertWeights(self.tensors),
            self.placement,
            self._topology,
            rank=self._rank,
            transport=transport,
            options=self._options,
        )

    def require(self, placement: ExpertPlacement) -> None:
        """Compare every byte of every slot."""
        for layer, row in enumerate(self._held(placement)):
            for slot, expert in enumerate(row):
                for live, each in zip(self.tensors[layer], self._bytes, strict=True):
                    if not torch.equal(live[slot], self._content(layer, int(expert), each)):
                        raise RuntimeError(f"rank {self._rank}, layer {layer}, slot {slot} is not expert {expert}")

    def batch_ms(self, world: WorldRank, max_ctas: int, runs: int) -> float:
        """Return how long this rank takes for nothing but the messages of the full update, in bare batches."""
        slot_nbytes, device = EXPERT_NBYTES, CudaDevice(self._device)
        plan = plan_update(self.placement, self.targets["full"], self._topology, self._rank)
        posted = PostedUpdate(plan, [UpdateOptions().operations_per_group // len(slot_nbytes)] * len(plan))
        num_recvs = max(len(layer.recvs) for layer in plan[:])
        staging = StagingBuffer(0, device.allocate(StagingPool.layer_nbytes(num_recvs, slot_nbytes)), device)
        group = _nccl_group(world, max_ctas)
        batches: list[list[dist.P2POp]] = []
        for row in range(len(plan)):
            layer = posted[row]
            recvs = sorted(zip(layer.plan.recvs, layer.recv_groups, strict=True), key=lambda entry: entry[0])
            staging.lay_out([recv.dst_slot for recv, _ in recvs], slot_nbytes)
            parts: list[list[dist.P2POp]] = [[] for _ in range(layer.num_groups)]
            for recv, number in recvs:
                views = staging.views(recv.dst_slot)
                parts[number] += [dist.P2POp(dist.irecv, view, recv.src_rank, group) for view in views]
            for send, number in zip(layer.plan.sends, layer.send_groups, strict=True):
                live = [tensor[send.src_slot] for tensor in self.tensors[row]]
                parts[number] += [dist.P2POp(dist.isend, view, send.dst_rank, group) for view in live]
            batches += parts
        times = []
        for _ in range(runs + 1):
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            for batch in batches:
                _post(batch)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        for recv in layer.plan.recvs:
            for view, each in zip(staging.views(recv.dst_slot), self._bytes, strict=True):
                if not torch.equal(view, self._content(row, recv.logical_expert, each)):
                    raise RuntimeError(f"rank {self._rank}: a bare batch did not bring expert {recv.logical_expert}")
        return median(times[1:])

    def _held(self, placement: ExpertPlacement) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
        return placement.physical_to_logical_map[:, self._topology.slots_of(self._rank)]

    @staticmethod
    def _content(layer: int, expert: int, each: Tensor) -> Tensor:
        """Return bytes that differ between any two experts of a model: by a sum, and by a rotation."""
        return (each + layer * 31 + expert).flatten().roll(expert // 256 + layer).view(each.shape)


# --- The trace of one update


def _trace(options: argparse.Namespace) -> Figures:
    return World(options.ranks, timeout_s=600).run(trace_update, options)[0]


def trace_update(world: WorldRank, options: argparse.Namespace) -> Figures:
    """Be one rank; return what the device did while a layer was pulled, copied and committed."""
    experts = _Experts(world, options)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with TemporaryDirectory() as folder, experts.updater(CopyEngineTransport()) as updater:
        updater.update(experts.targets["full"])
        updater.update(experts.placement)
        dist.barrier()
        with torch.profiler.profile(activities=activities) as profile:
            summary = updater.update(experts.targets["full"])
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        if options.trace is not None and world.rank == 0:
            options.trace.write_bytes(file.read_bytes())
        events = json.loads(file.read_text())["traceEvents"]
        experts.require(experts.targets["full"])
        received = summary.received_nbytes_within_node + summary.received_nbytes_across_nodes
    pulls = [(event["ts"], event["ts"] + event["dur"]) for event in events if "PtoP" in event.get("name", "")]
    kinds = Counter(event.get("cat") for event in events)
    kernels = Counter(event["name"] for event in events if event.get("cat") == "kernel")
    commits = sum(count for name, count in kernels.items() if "commit" in name)
    return {
        "copies": kinds["gpu_memcpy"],
        "commit_kernels": commits,
        "other_kernels": kernels.total() - commits,
        "update_layers": options.layers,
        "gb_per_s_while_pulling": received / _covered_us(pulls) / 1e3 if pulls else 0.0,
    }


def _covered_us(spans: Sequence[tuple[float, float]]) -> float:
    """Return how much time is inside of any span."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


# --- Serving, and the soak


_SERVING = (
    *("--layers", "58", "--tokens", "1024", "--steps", "500", "--runs", "2"),
    *("--updates", "4", "--mb-per-step", "25", "--switch-interval-ms", "0.1"),
)
"""DeepSeek-V3 has 58 layers with experts. With so many tokens, steps are as long as those of a model that is served."""


def _serving(options: argparse.Namespace) -> Figures:
    parser = argparse.ArgumentParser()
    gpu_serving.add_arguments(parser)
    return gpu_serving.run(parser.parse_args(["--ranks", str(options.ranks), *_SERVING]))


def _soak(options: argparse.Namespace) -> Figures:
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from support.soak import Soak, soak_rank  # noqa: PLC0415 - it lies with the tests

    figures: Figures = {}
    for name in ("dist", "copy"):
        soak = Soak(backend="nccl", transport=name, num_updates=options.soak_updates, num_layers=2)
        results = World(options.ranks, timeout_s=300).run(soak_rank, soak)
        figures |= {
            f"{name}_passes": results[0].num_steps,
            f"{name}_updates": results[0].num_updates,
            f"{name}_faults": sum(
                each.torn + each.disagreeing + each.other_logits + len(each.wrong_slots) for each in results
            ),
        }
    return figures


_PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "links": _links,
    "update": _updates,
    "trace": _trace,
    "serving": _serving,
    "soak": _soak,
}
