"""Real processes over gloo whose traffic pauses in the middle of an update, and whose transports break."""

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch.distributed as dist

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, TorchDistTransport, UpdateOptions
from async_eplb.errors import EplbError
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import SampleModel, random_placement

MODEL = SampleModel(hidden=32, intermediate=16)
NUM_LAYERS = 4
OPTIONS = UpdateOptions(
    transfer_timeout_s=1.5, control_timeout_s=2.0, progress_timeout_s=2.5, verify="checksum", lead=4
)
PAUSE_S = 5 * OPTIONS.progress_timeout_s


async def serve(updater: ExpertUpdater, new: ExpertPlacement, *, pause_s: float = 0.0, breaks: bool = False) -> str:
    """Update beside forward passes, in which ranks wait for each other; return the name of the error, or nothing."""
    handle = updater.begin(new)
    for number in range(10_000):
        await updater.step()
        done = [None] * dist.get_world_size()
        await anyio.to_thread.run_sync(dist.all_gather_object, done, handle.done)
        if all(done):
            break
        if number == 2:
            await anyio.sleep(pause_s)
            if breaks and updater.running is not None:
                updater.running.failure.fail(OSError("no luck"))
    try:
        await handle.wait()
    except (EplbError, OSError) as error:
        return type(error).__name__
    return ""


def pause_and_go_on(world: WorldRank) -> list[str]:
    """Pause in an update, let one fail, and make another; return how they ended. Every byte is compared each time."""
    topology = EPTopology(world.num_ranks, 1, 3)
    rng = np.random.default_rng(0)
    physical = topology.num_physical_experts
    old, *new = (random_placement(rng, NUM_LAYERS, physical, physical // 2 + 1) for _ in range(4))
    tensors = MODEL.weights(old, topology, world.rank)

    async def live() -> list[str]:
        ends = []
        async with ExpertUpdater(
            ExpertWeights(tensors), old, topology, rank=world.rank, transport=TorchDistTransport(), options=OPTIONS
        ) as updater:
            for placement, pause_s, breaks in zip(
                new, (PAUSE_S, 0.0, 0.0), (False, world.rank == 1, False), strict=True
            ):
                ends.append(await serve(updater, placement, pause_s=pause_s, breaks=breaks))
                assert MODEL.wrong_slots(tensors, updater.placement, topology, world.rank) == []
            assert updater.placement == new[-1]
        return ends

    return anyio.run(live)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_pauses_and_failures_stop_nobody(num_ranks: int) -> None:
    """No step for five time-outs is no stall; after a failure the next update works, over another transport."""
    ends = run_world(pause_and_go_on, num_ranks)
    for rank, (paused, broken, after) in enumerate(ends):
        assert (paused, after) == ("", "")
        assert broken in (("OSError",) if rank == 1 else ("UpdateAborted", "BrokenTransport"))
