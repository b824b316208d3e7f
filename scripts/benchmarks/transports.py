"""How fast transports move a layer, against the bare operation below them: one flat IPC copy, one batch of NCCL's.

Experts have the shapes of DeepSeek-V3 in FP8: w13 [4096, 7168], w2 [7168, 2048] and their block scales in fp32, 44 MB
in four tensors. Each rank receives some from the next one and sends as many. Sides alternate, run by run, all ranks at
once; a run takes as long as its slowest rank, on the host's clock, from launch to the end of the wait. Raw IPC copies
read tensors that PyTorch's multiprocessing shares: ``flat`` one as large as all messages together, ``copies`` the same
messages one by one. The ``batch`` is ``batch_isend_irecv`` of the same messages on a group of its own. Every byte is
compared at the end.

Needs a CUDA device. Ranks beyond the number of GPUs share them; start MPS first, or they take turns. NCCL then treats
ranks as hosts of their own and moves bytes through sockets: its figures say what the transport adds, not how fast
NVLink is.

Predicted before the first measurement, for an H200 with MPS: the copies of 2 and of 4 ranks share 2.1 TB/s of payload,
so 32 experts a rank take 1.3 and 2.7 ms; the transport adds a thread's start and the launch of 128 copies, 0.2 ms,
which is 87 % and 93 % of the flat copy's bandwidth. NCCL: 1.3 GB/s a rank, 98 % of the bare batch.
That run showed 70 % and 77 %. Alone on the device, the 128 copies take 1.04 ms and a flat one 0.68 ms, on one stream or
on four, or as one batch of the driver's: 2.8 µs a copy, and half of them are scales of a few KB. With waits that look
more often and four streams: 74 % and 81 %. So the same messages one by one are measured too, predicted at 95 %. Between
GPUs, where 44 MB take 110 µs and not 21, the flat copy should be 10 % ahead. NCCL: 2.0 GB/s, 93 % to 105 %.
"""

import argparse
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import anyio
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from async_eplb import ExpertWeights
from async_eplb.device import CudaDevice
from async_eplb.staging import StagingBuffer, StagingPool
from async_eplb.testing.processes import WorldRank, run_world, take_gpu
from async_eplb.transport import TRANSPORTS, Exchange, Message, MessageGroup, Pull, Pulls, TransportOptions
from async_eplb.workers import ThreadWorkers
from benchmarks._expert import EXPERT_NBYTES

_TRANSPORT = "transport"
_NUM_WARM_UPS = 3
_TIMEOUT_S = 120.0

Side = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class _Job:
    kind: Literal["copy_engine", "nccl"]
    num_experts: int
    num_runs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="worlds to measure (default: 2 4)")
    parser.add_argument("--runs", type=int, default=30, help="of each side; medians are shown (default: 30)")
    parser.add_argument("--experts", type=int, default=32, help="that a rank pulls in a run (default: 32)")
    parser.add_argument("--nccl-experts", type=int, default=2, help="that NCCL moves in a run (default: 2)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return median times in milliseconds, GB/s that a rank receives, and the transport's share of the others'."""
    if not torch.cuda.is_available():
        print("scripts/bench transports needs a CUDA device, and there is none", file=sys.stderr)
        raise SystemExit(2)
    jobs = (_Job("copy_engine", options.experts, options.runs), _Job("nccl", options.nccl_experts, options.runs))
    figures: dict[str, float] = {}
    for num_ranks in options.ranks:
        for job in jobs:
            figures |= _measure(num_ranks, job)
    return figures


def _measure(num_ranks: int, job: _Job) -> dict[str, float]:
    ranks = run_world(_be_rank, num_ranks, job)
    nbytes = job.num_experts * sum(EXPERT_NBYTES)
    name = f"{job.kind}_{num_ranks}_ranks"
    times_ms = {side: median(map(max, zip(*(rank[side] for rank in ranks), strict=True))) for side in ranks[0]}
    figures: dict[str, float] = {}
    for side, ms in times_ms.items():
        figures |= {f"{name}_{side}_ms": ms, f"{name}_{side}_gb_per_s": nbytes / ms / 1e6}
        if side != _TRANSPORT:
            figures[f"{name}_over_{side}"] = ms / times_ms[_TRANSPORT]
    return figures


def _be_rank(world: WorldRank, job: _Job) -> dict[str, list[float]]:
    """Return the times of each side's runs, in milliseconds."""
    return anyio.run(_Bench(world, job, take_gpu(world)).run)


class _Bench:
    """One rank. It receives from the next rank and sends to the one before, slot by slot."""

    def __init__(self, world: WorldRank, job: _Job, torch_device: torch.device) -> None:
        self._world = world
        self._job = job
        self._device = CudaDevice(torch_device)
        self._next = (world.rank + 1) % world.num_ranks
        self._live = self._content(world.rank)
        slots = range(job.num_experts)
        self._memory = self._device.allocate(StagingPool.layer_nbytes(len(slots), EXPERT_NBYTES))
        self._staging = StagingBuffer(0, self._memory, self._device)
        self._staging.lay_out(slots, EXPERT_NBYTES)
        torch.cuda.synchronize()

    async def run(self) -> dict[str, list[float]]:
        name = "copy" if self._job.kind == "copy_engine" else "dist"
        transport = TRANSPORTS[name](TransportOptions(backend="nccl"))
        weights, workers = ExpertWeights({0: self._live}), ThreadWorkers()
        await transport.open(self._device, workers, weights, control_timeout_s=_TIMEOUT_S)
        exchange = self._exchange()

        async def move() -> None:
            with self._device.transferring():
                pending = transport.prepare(exchange).launch()
            await pending.wait(_TIMEOUT_S)

        bare = self._raw_copies() if self._job.kind == "copy_engine" else {"batch": self._bare_batch(exchange)}
        sides = {_TRANSPORT: move, **bare}
        await self._times_ms(_NUM_WARM_UPS, sides)
        self._memory.zero_()
        torch.cuda.synchronize()
        times = await self._times_ms(self._job.num_runs, sides)
        for slot, sent in enumerate(zip(*self._content(self._next), strict=True)):
            if not all(map(torch.equal, self._staging.views(slot), sent)):
                raise RuntimeError(f"rank {self._world.rank} did not receive what was sent")
        dist.barrier()
        await transport.aclose()
        return times

    async def _times_ms(self, num_runs: int, sides: dict[str, Side]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(num_runs):
            for name, side in sides.items():
                dist.barrier()
                start = time.perf_counter()
                await side()
                times[name].append((time.perf_counter() - start) * 1e3)
        return times

    def _content(self, rank: int) -> list[Tensor]:
        """Return the live weights of a rank: uint8 ``[slots, bytes]`` each."""
        generator = torch.Generator(self._device.torch_device).manual_seed(rank)
        return [
            torch.randint(
                256,
                (self._job.num_experts, nbytes),
                dtype=torch.uint8,
                device=self._device.torch_device,
                generator=generator,
            )
            for nbytes in EXPERT_NBYTES
        ]

    def _exchange(self) -> Exchange:
        slots = range(self._job.num_experts)
        if self._job.kind == "copy_engine":
            return Exchange(0, (), pulls=Pulls(tuple(Pull(self._next, slot, slot) for slot in slots), self._staging))

        def messages(peer: int, parts: Iterable[Tensor]) -> tuple[Message, ...]:
            return tuple(Message(peer, tag, data) for tag, data in enumerate(parts))

        previous = (self._world.rank - 1) % self._world.num_ranks
        sends = messages(previous, [tensor[slot] for slot in slots for tensor in self._live])
        recvs = messages(self._next, [view for slot in slots for view in self._staging.views(slot)])
        return Exchange(0, (MessageGroup(sends, recvs),))

    def _raw_copies(self) -> dict[str, Side]:
        """Return copies from tensors of the next rank, to targets of their own: as one, and message by message."""
        flat = torch.cat([tensor.flatten() for tensor in self._live])
        shared: list[list[tuple[Callable[..., Tensor], tuple[object, ...]]]] = [[]] * self._world.num_ranks
        mine = [reduce_tensor(tensor) for tensor in (flat, *self._live)]  # type: ignore[no-untyped-call]
        dist.all_gather_object(shared, mine)
        self._shared = flat  # others read it until the end
        sources = [rebuild(*arguments) for rebuild, arguments in shared[self._next]]
        targets = [torch.empty_like(source) for source in sources]
        torch.cuda.synchronize()

        def side(pairs: list[tuple[Tensor, Tensor]]) -> Side:
            async def copy() -> None:
                with self._device.transferring():
                    for target, source in pairs:
                        target.copy_(source)
                    self._device.record().synchronize()

            return copy

        tensors = list(zip(targets, sources, strict=True))
        messages = [(t[slot], s[slot]) for slot in range(self._job.num_experts) for t, s in tensors[1:]]
        return {"flat": side(tensors[:1]), "copies": side(messages)}

    def _bare_batch(self, exchange: Exchange) -> Side:
        group = dist.new_group(backend="nccl")
        (messages,) = exchange.groups
        operations = [dist.P2POp(dist.irecv, each.data, each.peer, group) for each in messages.recvs]
        operations += [dist.P2POp(dist.isend, each.data, each.peer, group) for each in messages.sends]

        async def post() -> None:
            with self._device.transferring():
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
                self._device.record().synchronize()

        return post
