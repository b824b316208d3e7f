"""Weights of any layout are rebound between processes, also where peers have mapped the ones before."""

import anyio
import numpy as np
import pytest
from support.odd_layouts import oddly_laid_out, on_cpu
from support.shared_memory import SharedMemory

from async_eplb import (
    CopyEngineTransport,
    EPTopology,
    ExpertUpdater,
    ExpertWeights,
    UpdateOptions,
)
from async_eplb.errors import OpenTimeout
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport.copy_engine import transport as transport_module
from async_eplb.transport.table import TRANSPORTS, TransportOptions

MODEL = SampleModel(hidden=32, intermediate=16)


async def update_and_rebind(rank: int, topology: EPTopology, kind: str) -> tuple[int, int]:
    """Update, rebind to equal weights elsewhere, and update; return how much was mapped before and after."""
    memory = SharedMemory()
    transport = TRANSPORTS[kind](TransportOptions(memory=lambda _: memory))
    allocate = on_cpu if kind == "dist" else memory.allocate
    rng = np.random.default_rng(topology.num_ranks)
    physical = topology.num_physical_experts
    placements = [random_placement(rng, 2, physical, physical // 2 + 1) for _ in range(4)]
    before = oddly_laid_out(MODEL.weights(placements[0], topology, rank), allocate)
    async with ExpertUpdater(
        ExpertWeights(before),
        placements[0],
        topology,
        rank=rank,
        transport=transport,
        options=UpdateOptions(verify="checksum" if kind == "dist" else "off"),  # its column would not be shared
        device=memory,
    ) as updater:
        num_mapped = len(memory.mapped)
        await updater.update(placements[1])
        assert MODEL.wrong_slots(before, placements[1], topology, rank) == []
        async with updater.paused():
            after = oddly_laid_out(MODEL.weights(placements[1], topology, rank), allocate)
            await updater.rebind(ExpertWeights(after))
        num_mapped_now = len(memory.mapped)
        for placement in placements[2:]:
            await updater.update(placement)
            assert MODEL.wrong_slots(after, placement, topology, rank) == []
    assert MODEL.wrong_slots(before, placements[1], topology, rank) == []
    assert memory.mapped == {}
    return num_mapped, num_mapped_now


def update_and_rebind_in_world(world: WorldRank, kind: str) -> tuple[int, int]:
    """Be one of its ranks."""
    return anyio.run(update_and_rebind, world.rank, EPTopology(world.num_ranks, 1, 3), kind)


@pytest.mark.parametrize("kind", ["dist", "copy", "hybrid"])
def test_weights_are_rebound_between_processes(kind: str) -> None:
    """Every byte is right after each update; what is mapped was replaced by as much, and is let go in the end."""
    for before, after in run_world(update_and_rebind_in_world, 2, kind):
        assert before == after
        assert (before > 0) == (kind != "dist")


class Impatient(CopyEngineTransport):
    """Waits a moment for other ranks."""

    def _gather(self, what: str, text: str) -> list[str]:
        if what == "unmapped":
            self._open_timeout_s = 0.5
        return super()._gather(what, text)


async def rebind_alone(rank: int, topology: EPTopology) -> tuple[int, ...]:
    """Rebind on rank 0 only; return the ranks that its error names."""
    transport_module.CLOSE_TIMEOUT_S = 0.2  # type: ignore[attr-defined] # as it imports it
    memory = SharedMemory()
    placement = random_placement(np.random.default_rng(0), 1, 4, 3)
    tensors = memory.share(MODEL.weights(placement, topology, rank))
    async with ExpertUpdater(
        ExpertWeights(tensors),
        placement,
        topology,
        rank=rank,
        transport=Impatient(memory=lambda _: memory),
        device=memory,
    ) as updater:
        if rank:
            await anyio.sleep(0.8)
            return ()
        async with updater.paused():
            with pytest.raises(OpenTimeout) as caught:
                await updater.rebind(ExpertWeights(memory.share(tensors)))
    assert memory.mapped == {}
    return caught.value.missing


def rebind_alone_in_world(world: WorldRank) -> tuple[int, ...]:
    """Be one of two ranks."""
    return anyio.run(rebind_alone, world.rank, EPTopology(2, 1, 2))


def test_a_rank_that_rebinds_alone_is_told() -> None:
    """Its peers may read the weights before: the transport is broken, the error names them, and nothing hangs."""
    assert run_world(rebind_alone_in_world, 2)[0] == (1,)
