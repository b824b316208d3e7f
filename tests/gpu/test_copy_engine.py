"""The copy engine between processes that share GPUs: IPC mappings and plain copies."""

import json
import time
from pathlib import Path

import anyio
import pytest
import torch
from support.shared_memory import be_on_host
from support.soak import Soak, soak_rank

from async_eplb import CopyEngineTransport, ExpertWeights, HybridTransport
from async_eplb.device import CudaDevice, until_passed
from async_eplb.errors import IpcUnavailable, TransferTimeout
from async_eplb.staging import StagingBuffer, StagingPool
from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.testing.processes import take_gpu
from async_eplb.testing.sample_model import SampleModel
from async_eplb.transport import Exchange, LaunchRule, Pull, Pulls
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc
from async_eplb.workers import ThreadWorkers

_SIZES = (1, 512, 100_003, 8 << 20)
_NUM_SLOTS = 4


class NotedIpc(CudaIpc):
    """Records its mappings."""

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.opened: list[int] = []
        self.closed: list[int] = []

    def open(self, handle: bytes) -> int:
        """Map an allocation."""
        self.opened.append(super().open(handle))
        return self.opened[-1]

    def close(self, address: int) -> None:
        """Unmap an allocation."""
        super().close(address)
        self.closed.append(address)


def device_of(world: WorldRank) -> CudaDevice:
    """Return a rank's device; ranks beyond the number of GPUs share them."""
    return CudaDevice(take_gpu(world))


def conform(world: WorldRank) -> tuple[int, bool]:
    """Run the conformance suite; return how many allocations were mapped, and whether all have been unmapped."""
    device = device_of(world)
    memory = NotedIpc(device.torch_device)
    transport = CopyEngineTransport(memory=lambda _: memory)
    anyio.run(lambda: check_transport(transport, device=device, seed=world.num_ranks))
    return len(memory.opened), sorted(memory.opened) == sorted(memory.closed)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_keeps_the_contract(num_ranks: int) -> None:
    """Every byte arrives, and nothing stays mapped."""
    for num_opened, all_closed in run_world(conform, num_ranks):
        assert num_opened >= num_ranks - 1
        assert all_closed


def conform_across_hosts(world: WorldRank) -> LaunchRule:
    """Run the conformance suite as one of two ranks of a host; return the launch rule."""
    be_on_host(world.rank // 2)
    device, transport = device_of(world), HybridTransport()
    anyio.run(lambda: check_transport(transport, device=device, seed=world.num_ranks))
    return transport.launch_rule


def test_the_hybrid_keeps_the_contract() -> None:
    """Two hosts of two ranks: copies within, NCCL between."""
    assert run_world(conform_across_hosts, 4) == [LaunchRule.GRANTED_IN_ORDER] * 4


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_pass_sees_whole_layers(num_ranks: int) -> None:
    """Updates beside a model whose collectives are NCCL's, hosts out of step: no pass sees a torn layer."""
    soak = Soak(backend="nccl", transport="copy", num_updates=10, model=SampleModel(hidden=512, intermediate=256))
    results = run_world(soak_rank, num_ranks, soak)
    for result in results:
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert result.commits == results[0].commits
        assert len(result.commits) == soak.num_updates * soak.num_layers


def test_the_hybrid_keeps_layers_whole() -> None:
    """Copies within a host and NCCL between hosts, launched at agreed boundaries."""
    soak = Soak(backend="nccl", transport="hybrid", num_nodes=2, num_updates=10)
    for result in run_world(soak_rank, 4, soak):
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert len(result.commits) == soak.num_updates * soak.num_layers


def traced_exchange(world: WorldRank, folder: Path, in_turn: bool, in_batches: bool) -> list[tuple[str, str, int]]:  # noqa: FBT001 - of a process
    """Trace one exchange with the next rank; return kind, name and bytes of all that the device did meanwhile."""
    device, file = device_of(world), folder / f"{world.rank}.json"
    generator = torch.Generator(device.torch_device).manual_seed(world.rank)
    live = [
        torch.randint(256, (_NUM_SLOTS, size), dtype=torch.uint8, device=device.torch_device, generator=generator)
        for size in _SIZES
    ]
    peer = (world.rank + 1) % world.num_ranks
    staging = StagingBuffer(0, device.allocate(StagingPool.layer_nbytes(_NUM_SLOTS, _SIZES)), device)
    staging.lay_out(range(_NUM_SLOTS), _SIZES)
    pulls = Pulls(tuple(Pull(peer, slot, slot) for slot in range(_NUM_SLOTS)), staging, in_turn)
    exchange = Exchange(0, (), pulls=pulls)

    def memory(torch_device: torch.device) -> CudaIpc:
        ipc = CudaIpc(torch_device)
        ipc.in_batches &= in_batches
        return ipc

    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    async def main() -> None:
        transport = CopyEngineTransport(memory=memory)
        weights = ExpertWeights({0: live})
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=60)
        torch.distributed.barrier()
        await transport.prepare(exchange).launch().wait(60)
        with torch.profiler.profile(activities=activities) as profile:
            await transport.prepare(exchange).launch().wait(60)
        profile.export_chrome_trace(str(file))
        torch.distributed.barrier()
        await transport.aclose()

    anyio.run(main)
    events = json.loads(file.read_text())["traceEvents"]
    return [
        (event["cat"], event["name"], int(event["args"].get("bytes", 0)))
        for event in events
        if event.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}
    ]


@pytest.mark.parametrize(("in_turn", "in_batches"), [(False, True), (True, True), (True, False)])
def test_a_pull_is_copies_and_no_kernels(tmp_path: Path, *, in_turn: bool, in_batches: bool) -> None:
    """The profiler sees copies, one for each tensor of a slot or for each batch, and nothing else on the device."""
    for seen in run_world(traced_exchange, 3, tmp_path, in_turn, in_batches):
        assert {kind for kind, _, _ in seen} == {"gpu_memcpy"}
        sizes = sorted(nbytes for _, _, nbytes in seen)
        assert sizes == sorted(_SIZES * _NUM_SLOTS) or (in_batches and sizes == [sum(_SIZES) * _NUM_SLOTS])


def wait_alone(world: WorldRank) -> tuple[float, bool]:
    """Pull in turn as the only one of three ranks; return how long that waits, and whether the device ends then."""
    device = device_of(world)
    weights = ExpertWeights({0: [device.allocate(4 << 20).view(4, -1)]})
    staging = StagingBuffer(0, device.allocate(StagingPool.layer_nbytes(1, [1 << 20])), device)
    staging.lay_out([0], [1 << 20])

    async def main() -> tuple[float, bool]:
        memory = CudaIpc(device.torch_device)
        transport = CopyEngineTransport(memory=lambda _: memory)
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=60)
        waited_s, ended = 0.0, False
        if world.rank == 0:
            prepared = transport.prepare(Exchange(0, (), pulls=Pulls((Pull(2, 0, 0),), staging, in_turn=True)))
            pending = prepared.launch()
            start = anyio.current_time()
            with pytest.raises(TransferTimeout):
                await pending.wait(0.5)
            waited_s = anyio.current_time() - start
            await anyio.to_thread.run_sync(until_passed, memory.end(), time.monotonic() + 5)
            ended = memory.end().query()
        torch.distributed.barrier()
        await transport.aclose()
        return waited_s, ended

    return anyio.run(main)


def test_a_device_waits_for_its_turn_and_can_give_up() -> None:
    """Rank 1 reads from rank 2 first, and does not."""
    waited_s, ended = run_world(wait_alone, 3)[0]
    assert waited_s >= 0.5
    assert ended


async def refused(transport: CopyEngineTransport, device: CudaDevice) -> tuple[tuple[int, ...], str]:
    """Open a transport that cannot be opened; return the ranks that the error names, and its message."""
    weights = ExpertWeights({0: [device.allocate(1 << 20).view(4, -1)]})
    with pytest.raises(IpcUnavailable) as caught:
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=60)
    await transport.aclose()
    return caught.value.ranks, str(caught.value)


def be_expandable(world: WorldRank) -> tuple[tuple[int, ...], str]:
    """Be a rank of which the last has its weights in expandable segments."""
    if world.rank == world.num_ranks - 1:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return anyio.run(refused, CopyEngineTransport(), device_of(world))


def test_expandable_segments_are_refused() -> None:
    """All ranks raise which rank has them, before anything moves."""
    for ranks, message in run_world(be_expandable, 2):
        assert ranks == (1,)
        assert "rank 1: weights are in memory without CUDA IPC handles" in message
        assert "expandable_segments" in message


def unmap_twice(world: WorldRank) -> bool:
    """Return whether an address that was unmapped is unknown to the driver."""
    device = device_of(world)
    memory = NotedIpc(device.torch_device)
    weights = ExpertWeights({0: [device.allocate(8 << 20).view(4, -1)]})

    async def main() -> None:
        transport = CopyEngineTransport(memory=lambda _: memory)
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=60)
        await transport.aclose()

    anyio.run(main)
    with pytest.raises(RuntimeError, match="CUDA_ERROR"):
        memory.close(memory.opened[0])
    return len(memory.closed) == 1


def test_nothing_stays_mapped() -> None:
    """The driver knows no mapping any more."""
    assert all(run_world(unmap_twice, 2))
