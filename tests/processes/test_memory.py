"""Memory and connections between processes: all there when updaters are open, and the same after updates."""

from pathlib import Path

import anyio
import pytest
import torch
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, TorchDistTransport, UpdateOptions
from async_eplb.device import CpuDevice
from async_eplb.errors import BrokenControlGroup
from async_eplb.plan import Planner
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import SampleModel

MODEL = SampleModel(hidden=32, intermediate=16)
TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
APART = ExpertPlacement.from_mapping([[0, 1, 2] + [3, 4, 5] * 3] * 2)
SPREAD = ExpertPlacement.from_mapping([[0, 1, 2] * 3 + [3, 4, 5]] * 2)
"""From the first to this, rank 0 sends twice as many slots as it has."""


class FakeGpu(CpuDevice):
    """A CPU that gloo takes for a GPU, so that bytes pass through other host memory; it counts its allocations.

    :param num_free: so many succeed
    """

    torch_device = torch.device("cuda")

    def __init__(self, num_free: int = 1000) -> None:
        self.num_allocations = 0
        self._num_free = num_free

    def allocate(self, nbytes: int) -> Tensor:
        """Count, and return memory."""
        self._count(nbytes)
        return super().allocate(nbytes)

    def allocate_host(self, nbytes: int) -> Tensor:
        """Count, and return memory."""
        self._count(nbytes)
        return super().allocate_host(nbytes)

    def _count(self, nbytes: int) -> None:
        if nbytes and self.num_allocations == self._num_free:
            raise MemoryError("the device is full")
        self.num_allocations += nbytes > 0


def held_before_and_after(world: WorldRank, planner: Planner) -> list[tuple[int, int]]:
    """Return allocations and connections of this process so far: before any update, and after each of some."""
    device, held = FakeGpu(), []
    tensors = MODEL.weights(APART, TOPOLOGY, world.rank)

    async def main() -> None:
        async with updater_of(world, tensors, device, UpdateOptions(planner=planner)) as updater:
            held.append((device.num_allocations, num_sockets()))
            for placement in (SPREAD, APART, SPREAD):
                await updater.update(placement)
                assert MODEL.wrong_slots(tensors, placement, TOPOLOGY, world.rank) == []
                held.append((device.num_allocations, num_sockets()))

    anyio.run(main)
    return held


def updater_of(
    world: WorldRank, tensors: dict[int, list[Tensor]], device: FakeGpu, options: UpdateOptions
) -> ExpertUpdater:
    """Return the updater of a rank, over gloo."""
    transport = TorchDistTransport(backend="gloo")
    return ExpertUpdater(
        ExpertWeights(tensors), APART, TOPOLOGY, rank=world.rank, transport=transport, options=options, device=device
    )


def num_sockets() -> int:
    """Return how many sockets this process has open."""
    files = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum(str(file.readlink()).startswith("socket:") for file in files)


@pytest.mark.parametrize("planner", [Planner(), Planner("relayed")], ids=lambda planner: planner.sources)
def test_updates_neither_allocate_nor_connect(planner: Planner) -> None:
    """All that gloo needs is there when updaters are open, also where sends exceed the host memory for them."""
    for before, *after in run_world(held_before_and_after, 4, planner):
        assert before[0] > 0
        assert before[1] >= 2 * (TOPOLOGY.num_ranks - 1)
        assert after == [before] * 3


def open_with_a_full_device(world: WorldRank) -> str:
    """Open on all ranks; rank 1 has no memory for staging. Return the name of what that ended in."""
    device = FakeGpu(num_free=1 if world.rank == 1 else 1000)
    tensors = MODEL.weights(APART, TOPOLOGY, world.rank)

    async def main() -> None:
        async with updater_of(world, tensors, device, UpdateOptions()) as updater:
            await updater.update(SPREAD)

    try:
        anyio.run(main)
    except MemoryError:
        return "full"
    except BrokenControlGroup as error:
        return f"lost {error.missing}"
    return "open"


def test_a_rank_without_memory_is_noticed_at_once() -> None:
    """It closes its connections, and the others lose it in their first round."""
    assert run_world(open_with_a_full_device, 4) == ["lost (1,)", "full", "lost (1,)", "lost (1,)"]
