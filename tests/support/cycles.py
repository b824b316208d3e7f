"""Updaters that are opened, used and closed many times by two processes, which count what is left each time."""

import gc
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anyio
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from async_eplb import (
    EPTopology,
    ExpertUpdater,
    ExpertWeights,
    UpdateOptions,
)
from async_eplb.errors import EplbError
from async_eplb.testing import WorldRank
from async_eplb.testing.processes import share_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport import TRANSPORTS, TransportOptions
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc
from support.shared_memory import SharedMemory

_NUM_LAYERS, _NUM_SLOTS = 6, 4


@dataclass(frozen=True, slots=True)
class Cycles:
    """Parameters of a run.

    :param transport: of the weights; ``"dist"`` is torch.distributed with the device's backend
    :param fault_every: so many cycles end with an update that a rank aborts; 0: none
    """

    transport: Literal["dist", "copy"]
    device: Literal["cpu", "cuda"] = "cpu"
    number: int = 30
    fault_every: int = 0
    model: SampleModel = field(default_factory=SampleModel)


@dataclass(frozen=True, slots=True)
class Left:
    """Resources in use after a cycle, when all ranks have closed their updaters and freed their weights.

    :param free_nbytes: memory of the whole device, which other processes would hold by a mapping, too; 0 on CPUs
    :param allocated_nbytes: of this process's tensors on the device
    :param num_threads: of whatever library
    :param failed: the update of this cycle did, as it should
    """

    free_nbytes: int
    allocated_nbytes: int
    num_files: int
    num_threads: int
    failed: bool


def left_after_cycles(world: WorldRank, cycles: Cycles) -> list[Left]:
    """Be one rank."""
    if cycles.device == "cuda":
        share_gpu(world.rank)
        torch.cuda.set_device(0)
    return [_Cycle(world, cycles, number).run() for number in range(cycles.number)]


class _Cycle:
    def __init__(self, world: WorldRank, cycles: Cycles, number: int) -> None:
        self._rank = world.rank
        self._cycles = cycles
        self._fails = cycles.fault_every > 0 and number % cycles.fault_every == cycles.fault_every - 1
        self._topology = EPTopology(world.num_ranks, 1, _NUM_SLOTS)

    def run(self) -> Left:
        failed = anyio.run(self._update)
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("eplb-"):
                thread.join()  # told to end with the updater, not awaited there
        on_gpu = self._cycles.device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        dist.barrier()  # all have freed what they had
        left = Left(
            free_nbytes=torch.cuda.mem_get_info()[0] if on_gpu else 0,
            allocated_nbytes=torch.cuda.memory_allocated() if on_gpu else 0,
            num_files=sum(1 for _ in Path("/proc/self/fd").iterdir()),
            num_threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208 - names only
            failed=failed,
        )
        dist.barrier()  # and all have looked
        return left

    async def _update(self) -> bool:
        """Open an updater, run an update, close it; return whether the update failed."""
        rng = np.random.default_rng(5)
        physical = self._topology.num_physical_experts
        old, new = (random_placement(rng, _NUM_LAYERS, physical, physical // 2 + 1) for _ in range(2))
        tensors: dict[int, list[Tensor]] = self._cycles.model.weights(
            old, self._topology, self._rank, self._cycles.device
        )
        shared = SharedMemory() if (self._cycles.transport, self._cycles.device) == ("copy", "cpu") else None
        if shared is not None:
            tensors = shared.share(tensors)
        memory = CudaIpc if shared is None else lambda _device: shared
        transport = TRANSPORTS[self._cycles.transport](TransportOptions(memory=memory))
        updater = ExpertUpdater(
            ExpertWeights(tensors),
            old,
            self._topology,
            rank=self._rank,
            transport=transport,
            options=UpdateOptions(verify="off" if shared is not None else "checksum", transfer_timeout_s=10.0),
            device=shared,
        )
        failed = False
        async with updater:
            try:
                async for _ in updater.stream(new):
                    if self._fails and self._rank == 1:
                        transport.abort()
            except EplbError:
                failed = True
        if failed != self._fails:
            raise AssertionError(f"rank {self._rank}: the update {'failed' if failed else 'did not fail'}")
        wrong = self._cycles.model.wrong_slots(tensors, updater.placement, self._topology, self._rank)
        if wrong:
            raise AssertionError(f"rank {self._rank}: slots {wrong} are wrong")
        if shared is not None:
            if shared.mapped:
                raise AssertionError(f"rank {self._rank}: {len(shared.mapped)} allocations are still mapped")
            shared.free()
        return failed
