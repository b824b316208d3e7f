"""After an updater is open, weights move without any more memory, neither of the device nor pinned.

No other process may use the GPU.
"""

from dataclasses import astuple, dataclass
from typing import Literal

import anyio
import numpy as np
import pytest
import torch
import torch.distributed as dist

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, UpdateOptions
from async_eplb.plan import Planner
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.processes import take_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport import TRANSPORTS, TransportOptions

MODEL = SampleModel(hidden=512, intermediate=256)
"""0.7 MB an expert, whose scales are packed."""
_NUM_LAYERS, _NUM_SLOTS, _NUM_UPDATES = 4, 4, 50
_NUM_TENSORS = 5 + _NUM_LAYERS + 1 + 3
"""Of an updater: maps, columns, staged slots, and scratch memory of each buffer."""
_ROUNDED_TO_NBYTES = 512
"""What torch's allocator makes of any size."""


@dataclass(frozen=True, slots=True)
class Case:
    """How weights move.

    :param name: of the transport
    """

    name: Literal["dist", "copy"]
    backend: Literal["gloo", "nccl"] | None = None
    verify: str = "off"
    sources: str = "chunked"


@dataclass(frozen=True, slots=True)
class Used:
    """Memory in use, and how often it was asked for so far.

    :param free_nbytes: of the whole device
    :param allocated_nbytes: of this process's tensors
    :param num_allocations: of device memory, from torch's cache or the driver
    :param num_pinned: allocations of pinned memory from the driver
    """

    free_nbytes: int
    allocated_nbytes: int
    num_allocations: int
    num_pinned: int

    @classmethod
    def now(cls) -> "Used":
        """Look when all ranks are at rest, on all of them."""
        torch.cuda.synchronize()
        dist.barrier()
        used = cls(
            free_nbytes=torch.cuda.mem_get_info()[0],
            allocated_nbytes=torch.cuda.memory_allocated(),
            num_allocations=int(torch.cuda.memory_stats()["allocation.all.allocated"]),
            num_pinned=int(torch.cuda.host_memory_stats()["num_host_alloc"]),
        )
        dist.barrier()
        return used


async def update(updater: ExpertUpdater, placement: ExpertPlacement, *, serving: bool) -> None:
    """Update, while nobody serves or beside steps."""
    if not serving:
        await updater.update(placement)
        return
    handle = updater.begin(placement)
    while not handle.done:
        await updater.step()
        await anyio.sleep(0.001)
    await handle.wait()


def used_before_and_after(world: WorldRank, case: Case) -> tuple[int, int, Used, Used]:
    """Move weights many times; return what was reserved, what opening took, and what is in use before and after."""
    device = take_gpu(world)
    topology = EPTopology(world.num_ranks, 2 if case.sources == "relayed" else 1, _NUM_SLOTS)
    rng = np.random.default_rng(1)
    physical = topology.num_physical_experts
    placements = [random_placement(rng, _NUM_LAYERS, physical, physical // 2 + 1) for _ in range(_NUM_UPDATES + 1)]
    tensors = MODEL.weights(placements[0], topology, world.rank, device)
    options = UpdateOptions(verify=case.verify, planner=Planner(case.sources), staging_depth=3)
    transport = TRANSPORTS[case.name](TransportOptions(backend=case.backend))
    weights = ExpertWeights(tensors)
    torch.cuda.synchronize()
    made_from = torch.cuda.memory_allocated()

    async def main() -> tuple[int, int, Used, Used]:
        updater = ExpertUpdater(weights, placements[0], topology, rank=world.rank, transport=transport, options=options)
        reserved = updater.reserved_nbytes
        async with updater:
            before = Used.now()
            for number, placement in enumerate(placements[1:]):
                await update(updater, placement, serving=number % 2 == 1)
            after = Used.now()
            assert updater.reserved_nbytes == reserved
        assert MODEL.wrong_slots(tensors, placements[-1], topology, world.rank) == []
        return reserved, before.allocated_nbytes - made_from, before, after

    return anyio.run(main)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "case",
    [
        Case("copy"),
        Case("copy", verify="checksum"),
        Case("dist", backend="nccl"),
        Case("dist", backend="nccl", verify="checksum"),
        Case("dist", backend="nccl", verify="canary", sources="relayed"),
        Case("dist", backend="gloo", verify="checksum"),
        Case("dist", backend="gloo", sources="relayed"),
    ],
    ids=lambda case: "-".join(str(value) for value in astuple(case) if value),
)
def test_updates_take_no_memory(case: Case) -> None:
    """Free and allocated memory are the same after opening and after 50 updates, and nothing was allocated between.

    What opening takes was known before.
    """
    for reserved, taken, before, after in run_world(used_before_and_after, 4 if case.sources == "relayed" else 2, case):
        assert after == before
        assert taken >= reserved
        if case.name == "copy":  # which takes nothing for itself
            assert taken <= reserved + _NUM_TENSORS * _ROUNDED_TO_NBYTES
