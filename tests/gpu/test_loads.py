"""Loads on a CUDA device: what is counted in a graph, and that it is read in the order of the model's stream."""

from types import SimpleNamespace

import anyio
import numpy as np
import pytest
import torch
from anyio import to_thread

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, LoadWindow, MemoryTransport
from async_eplb.load.group import LocalLoadGroup
from async_eplb.load.source import LoadSnapshot
from async_eplb.testing.sample_model import SampleModel

TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=2)
PLACEMENT = ExpertPlacement.trivial(1, 2, 2)
ABOUT_A_SECOND = 2_000_000_000


def counted(snapshot: LoadSnapshot) -> list[list[int]]:
    """Return the load of one rank: ``[layers, logical]``."""
    tokens: list[list[int]] = anyio.run(snapshot.summed, LocalLoadGroup()).tokens.tolist()
    return tokens


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_counts_and_masks_of_every_type(cuda: torch.device, dtype: str) -> None:
    """As on a CPU."""
    table = torch.tensor([[1, 0, 1, -1]], dtype=torch.int32, device=cuda)
    window = LoadWindow(1, 2, 1, cuda, expert_map=SimpleNamespace(physical_to_logical_map=table))
    numbers = torch.from_numpy(np.array([0, 1, 2, 3], dtype=dtype)).to(cuda)
    valid = torch.from_numpy(np.array([1, 1, 1, 0], dtype=dtype)).to(cuda)
    window.record(0, numbers, physical=True, valid=valid)
    window.record_counts(numbers[None])
    window.advance()
    assert counted(window.snapshot()) == [[1 + 1, 2 + 2]]


def test_a_graph_records_and_counts(cuda: torch.device) -> None:
    """Each replay counts again, by the map as it is then."""
    table = torch.tensor([[0, 1]], device=cuda)
    window = LoadWindow(1, 2, 8, cuda, expert_map=SimpleNamespace(physical_to_logical_map=table))
    ids, counts = torch.tensor([0, 0, 1], device=cuda), torch.tensor([[10, 20]], device=cuda)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window.record(0, ids, physical=True)
        window.record_counts(counts)
    graph.replay()
    window.advance()
    assert counted(window.snapshot()) == [[12, 21]]
    table.copy_(torch.tensor([[1, 0]]))
    graph.replay()
    window.advance()
    assert counted(window.snapshot()) == [[12 + 21, 21 + 12]]


def test_a_snapshot_waits_on_the_device_only(cuda: torch.device) -> None:
    """It is taken by the serving thread, behind work that the device has not done yet; nobody waits for that there."""
    tensors = SampleModel(hidden=8, intermediate=4).weights(PLACEMENT, TOPOLOGY, 0, cuda)
    window = LoadWindow(1, 2, 8, cuda)
    ids = torch.tensor([0, 1, 1], device=cuda)
    window.snapshot()  # the first of all allocates
    torch.cuda.synchronize()

    async def main() -> None:
        (transport,) = MemoryTransport.world(1)
        async with ExpertUpdater(ExpertWeights(tensors), PLACEMENT, TOPOLOGY, rank=0, transport=transport) as updater:

            def serve() -> None:
                with torch.cuda.stream(torch.cuda.Stream(cuda)):  # type: ignore[no-untyped-call]
                    torch.cuda._sleep(ABOUT_A_SECOND)  # type: ignore[no-untyped-call]
                    window.record(0, ids)
                    window.advance()
                    updater.step_sync()

            async with anyio.create_task_group() as tasks:
                snapshots = []

                async def take() -> None:
                    snapshots.append(await updater.calls.at_boundary(window.snapshot))

                tasks.start_soon(take)
                await anyio.wait_all_tasks_blocked()
                await to_thread.run_sync(serve)
            assert not snapshots[0].copied.query()
            load = await snapshots[0].summed(LocalLoadGroup())
            assert load.tokens.tolist() == [[1, 2]]

    anyio.run(main)


def test_a_rank_in_idle_is_read_behind_its_last_work(cuda: torch.device) -> None:
    """On another stream, which waits for the event that ``idle()`` was given."""
    tensors = SampleModel(hidden=8, intermediate=4).weights(PLACEMENT, TOPOLOGY, 0, cuda)
    window = LoadWindow(1, 2, 8, cuda)
    ids = torch.tensor([0, 1, 1], device=cuda)
    torch.cuda.synchronize()

    async def main() -> None:
        (transport,) = MemoryTransport.world(1)
        async with ExpertUpdater(ExpertWeights(tensors), PLACEMENT, TOPOLOGY, rank=0, transport=transport) as updater:
            with torch.cuda.stream(torch.cuda.Stream(cuda)):  # type: ignore[no-untyped-call]
                torch.cuda._sleep(ABOUT_A_SECOND // 4)  # type: ignore[no-untyped-call]
                window.record(0, ids)
                window.advance()
                after = updater.device.record()
            async with updater.idle(after=after):
                snapshot = await updater.calls.at_boundary(window.snapshot)
            load = await snapshot.summed(LocalLoadGroup())
            assert load.tokens.tolist() == [[1, 2]]

    anyio.run(main)
