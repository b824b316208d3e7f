"""NCCL between processes that share a GPU: a communicator of its own, launched at agreed boundaries."""

import json
import os
import sys
from pathlib import Path
from typing import Literal

import anyio
import pytest
import torch
import torch.distributed as dist
from support.soak import Soak, soak_rank

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    NcclOptions,
    TorchDistTransport,
    UpdateOptions,
)
from async_eplb.device import CudaDevice
from async_eplb.errors import BrokenTransport, TransferTimeout
from async_eplb.plan import Planner
from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.testing.processes import World, take_gpu
from async_eplb.transport import Exchange, Message, MessageGroup, PendingExchange
from async_eplb.workers import ThreadWorkers


def device_of(world: WorldRank) -> CudaDevice:
    """Return a rank's device; ranks beyond the number of GPUs share them."""
    return CudaDevice(take_gpu(world))


def conform(world: WorldRank, backend: Literal["gloo", "nccl"]) -> str:
    """Run the conformance suite."""
    device = device_of(world)
    transport = TorchDistTransport(backend=backend, nccl=NcclOptions(max_ctas=2, high_priority=True))
    anyio.run(lambda: check_transport(transport, device=device, seed=world.num_ranks))
    return repr(transport)


@pytest.mark.parametrize(("backend", "num_ranks"), [("nccl", 2), ("nccl", 4), ("gloo", 2)])
def test_it_keeps_the_contract(backend: Literal["gloo", "nccl"], num_ranks: int) -> None:
    """Every byte arrives: packed or not, with few CTAs on a stream of high priority; over gloo from pinned memory."""
    for rank, text in enumerate(run_world(conform, num_ranks, backend)):
        assert text == f"<TorchDistTransport rank {rank} of {num_ranks}, {backend}, closed>"


@pytest.mark.parametrize("operations_per_group", [256, 10])
def test_every_pass_sees_whole_layers(operations_per_group: int) -> None:
    """Updates beside a model whose collectives are NCCL's, launched whole or in many parts."""
    options = UpdateOptions(verify="checksum", operations_per_group=operations_per_group)
    soak = Soak(backend="nccl", num_updates=8, options=options)
    results = run_world(soak_rank, 2, soak)
    for result in results:
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert result.commits == results[0].commits
        assert len(result.commits) == soak.num_updates * soak.num_layers


@pytest.mark.parametrize("staging_depth", [2, 3])
def test_relays_keep_layers_whole(staging_depth: int) -> None:
    """Slots cross nodes once and are relayed inside the node, from staging, beside the next layer's first hop."""
    options = UpdateOptions(verify="checksum", planner=Planner("relayed"), staging_depth=staging_depth)
    soak = Soak(backend="nccl", num_nodes=2, num_updates=8, options=options)
    for result in run_world(soak_rank, 4, soak):
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert len(result.commits) == soak.num_updates * soak.num_layers


def receive_while_a_second_hop_is_late(world: WorldRank) -> list[int]:
    """Of two exchanges, wait for the one that was launched last; the other's sender launches it only then.

    Rank 0 receives from rank 1 in a second hop, and from rank 2 in the next row's first; return what it then has.
    """
    device = device_of(world)
    data = torch.full((2, 1 << 20), world.rank, dtype=torch.uint8, device=device.torch_device)
    others = [rank for rank in range(world.num_ranks) if rank != world.rank]

    async def main() -> None:
        transport = TorchDistTransport(backend="nccl")
        weights = ExpertWeights({0: [torch.zeros(1, 1, device=device.torch_device)]})
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=60, relay_peers=others)

        def launch(hop: int, *, to: int | None = None, of: int | None = None) -> PendingExchange:
            sends = () if to is None else (Message(to, 0, data[hop]),)
            recvs = () if of is None else (Message(of, 0, data[hop]),)
            with device.transferring():
                return transport.prepare(Exchange(1 - hop, (MessageGroup(sends, recvs),), hop)).launch()

        second = launch(1, of=1) if world.rank == 0 else None
        if world.rank in (0, 2):
            await (launch(0, of=2) if world.rank == 0 else launch(0, to=0)).wait(30)
        dist.barrier()
        if world.rank in (0, 1):
            await (second or launch(1, to=0)).wait(30)
        torch.cuda.synchronize()
        dist.barrier()
        await transport.aclose()

    torch.cuda.synchronize()
    anyio.run(main)
    return [int(row.unique()) for row in data]


def test_a_first_hop_does_not_wait_for_a_second_hop() -> None:
    """It arrives while the second hop, launched before it, has no sender yet."""
    received, *_ = run_world(receive_while_a_second_hop_is_late, 3)
    assert received == [2, 1]


_TWO_NODES = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=2)
_OLD, _NEW = (ExpertPlacement.from_mapping([row] * 6) for row in ([0, 1, 2, 3, 0, 1, 4, 5], [0, 1, 4, 3, 2, 4, 2, 5]))
"""Expert 2 goes from rank 1 to both ranks of the other node, and 4 from rank 3 to rank 1; rank 0 keeps what it has."""
_LARGE = 1 << 29
"""Bytes of a slot that NVLink takes milliseconds for, as hosts take from one launch to the next."""


def traced_relays(world: WorldRank, folder: Path) -> tuple[list[list[int]], list[tuple[int, float, float]]]:
    """Update while profiled; return least and largest byte of each slot; stream, start and end of NCCL's kernels."""
    device = device_of(world)
    slots = _TWO_NODES.slots_of(world.rank)
    tensors = {
        layer: [torch.tensor(row[slots], dtype=torch.uint8, device=device.torch_device)[:, None].repeat(1, _LARGE)]
        for layer, row in enumerate(_OLD.physical_to_logical_map)
    }
    torch.cuda.synchronize()
    options = UpdateOptions(planner=Planner("relayed"), staging_depth=3)
    file = folder / f"{world.rank}.json"

    async def main() -> None:
        async with ExpertUpdater(
            ExpertWeights(tensors), _OLD, _TWO_NODES, rank=world.rank, transport=TorchDistTransport(), options=options
        ) as updater:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                await updater.update(_NEW)
            profile.export_chrome_trace(str(file))

    anyio.run(main)
    torch.cuda.synchronize()
    events = json.loads(file.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel" and "nccl" in event["name"].lower()]
    held = [[int(byte) for byte in row.aminmax()] for layer in tensors.values() for row in layer[0]]
    return held, [(int(event["args"]["stream"]), event["ts"], event["ts"] + event["dur"]) for event in kernels]


def test_second_hops_run_beside_first_hops(tmp_path: Path) -> None:
    """On a stream of their own, and at the same time; only ranks of the node that passes something on have one."""
    results = run_world(traced_relays, 4, tmp_path)
    for rank, (held, _) in enumerate(results):
        wanted = _NEW.physical_to_logical_map[:, _TWO_NODES.slots_of(rank)].reshape(-1).tolist()
        assert held == [[expert, expert] for expert in wanted]
    assert [len({stream for stream, _, _ in kernels}) for _, kernels in results] == [0, 1, 2, 2]
    for _, kernels in results[2:]:
        beside = [(a, b) for a in kernels for b in kernels if a[0] < b[0] and a[1] < b[2] and b[1] < a[2]]
        assert beside


def time_out(world: WorldRank) -> tuple[str, str, int]:
    """Receive a message that nobody sends; return the error, that of a later exchange, and the model's sum after it."""
    device = device_of(world)
    model_group = dist.new_group(backend="nccl")
    live = torch.zeros(1, 1 << 20, dtype=torch.uint8, device=device.torch_device)
    total = torch.tensor([world.rank + 1], device=device.torch_device)
    dist.all_reduce(total, group=model_group)
    outcome = []

    async def main() -> None:
        transport = TorchDistTransport()
        await transport.open(device, ThreadWorkers(), ExpertWeights({0: [live]}), control_timeout_s=60)
        if world.rank == 0:
            message = Message(1, 0, device.allocate(1 << 20))
            with device.transferring():
                pending = transport.prepare(Exchange(3, (MessageGroup((), (message,)),))).launch()
            for act in (lambda: pending.wait(0.5), lambda: transport.prepare(Exchange(3, ()))):
                try:
                    await act()  # type: ignore[misc]
                except (TransferTimeout, BrokenTransport) as error:
                    outcome.append(f"{type(error).__name__}: {error}")
        dist.all_reduce(total, group=model_group)
        torch.cuda.synchronize()
        await transport.aclose()

    anyio.run(main)
    return *(outcome or ["", ""]), int(total)  # type: ignore[return-value]


def test_a_timeout_breaks_the_transport_alone() -> None:
    """A receive that nobody sends ends at its deadline with the layer's number; the model's group goes on."""
    (error, later, total), (_, _, other_total) = run_world(time_out, 2)
    assert error.startswith("TransferTimeout: rank 0, row 3: the exchange did not finish within 0.5 s")
    assert later.startswith("BrokenTransport: ")
    assert total == other_total == 6


@pytest.mark.skipif("ASYNC_EPLB_LONG_SOAK" not in os.environ, reason="takes minutes; set ASYNC_EPLB_LONG_SOAK=1")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["dist", "copy"])
@pytest.mark.parametrize("num_ranks", [4, 8])
def test_thousands_of_passes_beside_hundreds_of_updates(num_ranks: int, transport: str) -> None:
    """5,000 passes and 200 updates with hosts out of step: no hang, no torn layer, the same logits, the right bytes."""
    soak = Soak(backend="nccl", transport=transport, num_updates=200, num_steps=5000, num_layers=2)  # type: ignore[arg-type]
    results = World(num_ranks, timeout_s=800).run(soak_rank, soak)
    for result in results:
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert result.commits == results[0].commits
        assert len(result.commits) == soak.num_updates * soak.num_layers
        assert result.num_steps >= 5000
    waits = max(result.num_fence_waits for result in results)
    longest_ms = max(result.longest_step_ms for result in results)
    sys.stdout.write(f"\n{num_ranks} ranks, {transport}: {results[0].num_steps} passes, {waits} fence waits, ")
    sys.stdout.write(f"a step() took {longest_ms:.1f} ms at most\n")
