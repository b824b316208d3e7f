"""Autograd and inference mode of the caller do not matter: an updater is made in one and used in another."""

from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext

import anyio
import pytest
import torch
from support.helpers import TINY, in_virtual_time, memory_ranks, on_all, two_placements
from support.odd_layouts import oddly_laid_out

from async_eplb import EPTopology, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.sync import SyncUpdater
from async_eplb.transport import MemorySchedule
from async_eplb.workers import ThreadWorkers

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
OLD, NEW = two_placements(TOPOLOGY, num_layers=2, num_experts=4)
OPTIONS = UpdateOptions(verify="checksum")

Mode = Callable[[], AbstractContextManager[object]]
MODES: dict[str, Mode] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("entered", MODES)
@pytest.mark.parametrize("made", MODES)
@in_virtual_time
async def test_modes_of_the_caller_do_not_matter(made: str, entered: str, used: str) -> None:
    """Weights are made, an updater is entered, and it is used and left, each in another mode of the same thread."""
    with MODES[made]():
        ranks = memory_ranks(
            OLD, TOPOLOGY, schedule=MemorySchedule(control_s=0.01), options=OPTIONS, lay_out=oddly_laid_out
        )
    async with AsyncExitStack() as stack:
        with MODES[entered]():
            for rank in ranks:
                await stack.enter_async_context(rank.updater)
        with MODES[used]():
            await on_all(ranks, lambda updater: updater.update(NEW))
            handles = [rank.updater.begin(OLD) for rank in ranks]
        while not all(handle.done for handle in handles):
            await on_all(ranks, lambda updater: updater.step())
            await anyio.sleep(0.01)
        with MODES[used]():
            for rank, handle in zip(ranks, handles, strict=True):
                assert (await handle.wait()).layers == (0, 1)
                rank.assert_consistent()


@pytest.mark.parametrize("makes", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("steps", [nullcontext, torch.inference_mode])
def test_an_engine_in_inference_mode(makes: Mode, steps: Mode) -> None:
    """Its updater is made lazily inside its loop or before it; threads of its own have modes of their own."""
    topology = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
    old, new = two_placements(topology, 3, num_experts=4)
    (transport,) = MemoryTransport.world(1)
    with makes():
        tensors = {row: [*map(torch.clone, given)] for row, given in TINY.weights(old, topology, 0).items()}
        updater = SyncUpdater(
            ExpertWeights(tensors),
            old,
            topology,
            rank=0,
            transport=transport,
            options=OPTIONS,
            workers=ThreadWorkers(),
        )
    with updater, steps():
        updater.update(new)
        handle = updater.begin(old)
        while not handle.done:
            updater.step()
        handle.wait()
    assert TINY.wrong_slots(tensors, old, topology, 0) == []
