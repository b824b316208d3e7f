"""How fast a staged layer gets into the live weights: one fused launch, against plain copies and one flat copy.

Layers have the shapes of DeepSeek-V3 in FP8: w13 [4096, 7168], w2 [7168, 2048] and their block scales in fp32, 44 MB an
expert. All slots of a rank are new, or 7 of 36. Ways alternate, run by run, over two layers, two staging buffers and
two pairs of flat buffers, each larger than the L2 cache; the device sleeps before each run, so that its time holds no
host time. Host time is that of the commit call of an idle device, which is all that the serving thread spends but for
recording an event; the flat copy's, one `copy_`, shows how fast the host is. Bandwidth counts bytes read and written.
Needs a CUDA device.

Predicted before the first measurement, for an H200: flat copy 4.1 TB/s; fused 97 % of it with 9 and 7 slots, 98 % with
36, 20 µs of host time whatever the slots; a copy for each tensor 70 % and 6 µs a tensor, `_foreach_copy_` 68 %.
That run, with programs of 8 warps, showed 96 %, 30 µs, 67 % and 8 µs, and 45 % because the lists were of bytes. So with
32 warps, Triton's binding of arguments left out of the launch, and lists of words: 99 %, 20 µs, and 85 %.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertWeights
from async_eplb.commit.committer import Committer, CopyCommitter, PreparedCommit, committer_for
from async_eplb.device import CudaDevice
from async_eplb.expert_map import ExpertMap
from async_eplb.plan import plan_layer
from async_eplb.staging import BufferSize, BufferState, StagingBuffer, StagingPool
from benchmarks._device_time import device_time_ms
from benchmarks._expert import EXPERT_TENSORS

_CASES = ((9, 9), (36, 36), (7, 36))
"""(slots that change, slots of a rank)"""
_NUM_ROWS = 2
_NUM_WARM_UPS = 30


@dataclass(frozen=True)
class _Way:
    """One way to write a layer's bytes; ``runs`` has one call for each layer that is rotated over."""

    name: str
    runs: tuple[Callable[[], object], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--runs", type=int, default=100, help="runs of each way; medians are shown (default: 100)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return medians of each case and way: TB/s, microseconds of host time, and the fused commit over the flat copy."""
    if not torch.cuda.is_available():
        print("scripts/bench commit needs a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    figures: dict[str, float] = {}
    for changed, slots in _CASES:
        figures |= _measure(f"{changed}_of_{slots}", device, changed, slots, options.runs)
        torch.cuda.empty_cache()
    return figures


def _measure(case: str, device: CudaDevice, changed: int, slots: int, num_runs: int) -> dict[str, float]:
    rank = _Rank(device, changed, slots)
    ways = [*rank.ways()]
    device_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    host_us: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(-_NUM_WARM_UPS, num_runs):
        for way in ways:
            call = way.runs[number % _NUM_ROWS]
            on_device, on_host = device_time_ms(call), _host_us(call)
            if number >= 0:
                device_ms[way.name].append(on_device)
                host_us[way.name].append(on_host)
    bandwidth = {name: 2e-9 * rank.nbytes / median(times) for name, times in device_ms.items()}
    figures = {f"{case}_{name}_tb_s": value for name, value in bandwidth.items()}
    figures |= {f"{case}_{name}_over_flat": value / bandwidth["flat"] for name, value in bandwidth.items()}
    figures |= {f"{case}_{name}_host_us": median(times) for name, times in host_us.items()}
    figures[f"{case}_record_us"] = median(_host_us(device.record) for _ in range(num_runs))
    figures[f"{case}_prepare_us"] = median(_host_us(rank.prepare) for _ in range(num_runs))
    return figures


class _Rank:
    """Live weights, staging and flat buffers of one rank, all of random bytes."""

    def __init__(self, device: CudaDevice, changed: int, slots: int) -> None:
        self._device = device
        self._changed = changed
        topology = EPTopology(num_ranks=8, num_nodes=1, num_local_physical_experts=slots)
        physical = np.arange(topology.num_physical_experts)
        experts = topology.num_physical_experts
        self._old = ExpertPlacement.from_mapping([physical] * _NUM_ROWS, experts)
        self._new = ExpertPlacement.from_mapping([self._exchanged(physical, slots)] * _NUM_ROWS, experts)
        self._plan = plan_layer(
            self._old.physical_to_logical_map[0], self._new.physical_to_logical_map[0], topology, rank=0
        )
        self._weights = ExpertWeights({row: list(self._tensors(slots)) for row in range(_NUM_ROWS)})
        self._map = ExpertMap(self._old, topology, rank=0, device=device.torch_device)
        self._maps = [self._map.layer_maps(self._new, row) for row in range(_NUM_ROWS)]
        self._fused = committer_for(self._weights, self._map)
        self._slot_nbytes = self._weights.slot_nbytes(0)
        scratch_nbytes = 2 * self._fused.scratch_nbytes(0)  # of both committers
        size = BufferSize(StagingPool.layer_nbytes(changed, self._slot_nbytes), scratch_nbytes)
        pool = StagingPool(_NUM_ROWS, device, size)
        pool.allocate()
        self._buffers = pool.buffers
        for buffer in pool.buffers:
            buffer.lay_out(self._plan.staged_slots, self._slot_nbytes)
            for slot in self._plan.staged_slots:
                for part in buffer.views(slot):
                    part.random_(0, 256)
        self.nbytes = changed * sum(self._slot_nbytes)
        self._flat = [[self._random(self.nbytes) for _ in range(2)] for _ in range(_NUM_ROWS)]

    def ways(self) -> Iterator[_Way]:
        """Yield each way to commit, and the flat copy."""
        yield _Way("fused", self._commits(self._fused))
        yield _Way("foreach", self._commits(CopyCommitter(self._weights, self._map)))
        yield _Way("loop", tuple(partial(self._copy_each, row) for row in range(_NUM_ROWS)))
        yield _Way("flat", tuple(partial(dst.copy_, src) for src, dst in self._flat))

    def prepare(self) -> None:
        """Do what the transfer thread does for a commit."""
        self._buffers[0].lay_out(self._plan.staged_slots, self._slot_nbytes)
        self._fused.prepare(0, self._plan, self._buffers[0], self._maps[0])

    def _commits(self, committer: Committer) -> tuple[Callable[[], object], ...]:
        def repeatable(buffer: StagingBuffer, commit: PreparedCommit) -> int:
            buffer.state = BufferState.STAGED
            return commit.run()

        return tuple(
            partial(repeatable, buffer, committer.prepare(row, self._plan, buffer, self._maps[row]))
            for row, buffer in enumerate(self._buffers)
        )

    def _copy_each(self, row: int) -> None:
        for slot in self._plan.staged_slots:
            for view, staged in zip(self._weights.slot_views(row, slot), self._buffers[row].views(slot), strict=True):
                view.copy_(staged)

    def _exchanged(self, physical: np.ndarray, slots: int) -> np.ndarray:
        """Return the map in which the first slots of ranks 0 and 1 have changed places."""
        new = physical.copy()
        new[: self._changed], new[slots : slots + self._changed] = (
            physical[slots : slots + self._changed],
            physical[: self._changed],
        )
        return new

    def _tensors(self, slots: int) -> Iterator[Tensor]:
        for dtype, shape in EXPERT_TENSORS:
            nbytes = slots * int(np.prod(shape)) * dtype.itemsize
            yield self._random(nbytes).view(dtype).view(slots, *shape)

    def _random(self, nbytes: int) -> Tensor:
        return self._device.allocate(nbytes).random_(0, 256)


def _host_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6
