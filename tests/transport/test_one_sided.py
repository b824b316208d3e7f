"""Transports that read peers' weights, between processes that share memory in place of GPUs; ``gpu/`` has real ones."""

from collections.abc import Callable
from typing import Literal

import anyio
import numpy as np
import pytest
import torch
from support.shared_memory import SharedMemory, be_on_host
from support.soak import Soak, soak_rank

from async_eplb import (
    CopyEngineTransport,
    EPTopology,
    ExpertUpdater,
    ExpertWeights,
    HybridTransport,
    Transport,
    UpdateOptions,
)
from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.errors import BrokenTransport, IpcUnavailable, TransferTimeout
from async_eplb.staging import StagingBuffer
from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.testing.transport import CountingVoter
from async_eplb.transport import Exchange, LaunchRule, Message, MessageGroup, Pull, Pulls
from async_eplb.workers import ThreadWorkers

MODEL = SampleModel(hidden=32, intermediate=16)


def conform(world: WorldRank) -> int:
    """Run the conformance suite; return what is still mapped."""
    memory = SharedMemory()
    transport = CopyEngineTransport(memory=lambda _: memory)
    anyio.run(lambda: check_transport(transport, device=memory, seed=world.num_ranks))
    return len(memory.mapped)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_it_keeps_the_contract(num_ranks: int) -> None:
    """Every byte arrives from the slot that the pull names, and nothing stays mapped."""
    assert run_world(conform, num_ranks) == [0] * num_ranks


def conform_across_hosts(world: WorldRank) -> tuple[LaunchRule, int]:
    """Run the conformance suite as one of two ranks of a host; return what the transport asks for, and is mapped."""
    be_on_host(world.rank // 2)
    memory = SharedMemory()
    transport = HybridTransport(memory=lambda _: memory)
    anyio.run(lambda: check_transport(transport, device=memory, seed=world.num_ranks))
    return transport.launch_rule, len(memory.mapped)


def test_the_hybrid_keeps_the_contract() -> None:
    """Two hosts of two ranks: pulls within, messages between."""
    assert run_world(conform_across_hosts, 4) == [(LaunchRule.GRANTED, 0)] * 4


def test_slots_are_pulled_once() -> None:
    """However many parts an exchange with others is launched in: with the first one."""
    groups = (MessageGroup((), ()),) * 3
    pulls = Pulls((Pull(1, 0, 0),), StagingBuffer(0, torch.empty(0, dtype=torch.uint8), CpuDevice()))
    parts = Exchange(0, groups, pulls=pulls).parts()
    assert [part.pulls for part in parts] == [pulls, None, None]
    assert [len(part.groups) for part in parts] == [1, 1, 1]
    assert [part.pulls for part in Exchange(0, (), pulls=pulls).parts()] == [pulls]


def test_it_asks_for_grants() -> None:
    """It reads peers' live weights, and nobody orders that with the model's collectives."""
    assert CopyEngineTransport.launch_rule is LaunchRule.GRANTED
    assert not CopyEngineTransport.needs_ordered_launch


def update_many_times(world: WorldRank, num_updates: int, ranks_per_host: int | None = None) -> int:
    """Update to random placements; compare every byte each time. Return how many allocations were mapped.

    :param ranks_per_host: with a hybrid transport; one host and no hybrid without it
    """
    memory = SharedMemory()
    transport: Transport
    if ranks_per_host is None:
        topology, transport = EPTopology(world.num_ranks, 1, 3), CopyEngineTransport(memory=lambda _: memory)
    else:
        be_on_host(world.rank // ranks_per_host)
        topology = EPTopology(world.num_ranks, world.num_ranks // ranks_per_host, 3)
        transport = HybridTransport(memory=lambda _: memory)
    rng = np.random.default_rng(world.num_ranks)
    physical = topology.num_physical_experts
    placement = random_placement(rng, 3, physical, physical // 2 + 1)
    tensors = memory.share(MODEL.weights(placement, topology, world.rank))

    async def main() -> int:
        async with ExpertUpdater(
            ExpertWeights(tensors),
            placement,
            topology,
            rank=world.rank,
            transport=transport,
            device=memory,
        ) as updater:
            num_mapped = len(memory.mapped)
            for _ in range(num_updates):
                new = random_placement(rng, 3, physical, physical // 2 + 1, num_empty=int(rng.integers(0, 2)))
                await updater.update(new)
                assert MODEL.wrong_slots(tensors, new, topology, world.rank) == []
            assert len(memory.mapped) == num_mapped
        assert memory.mapped == {}
        return num_mapped

    return anyio.run(main)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_many_updates_between_processes(num_ranks: int) -> None:
    """Every byte is right after each; each allocation of each peer is mapped once, from open to close."""
    num_rows = 3
    assert run_world(update_many_times, num_ranks, 25) == [(num_ranks - 1) * num_rows] * num_ranks


def test_many_updates_between_hosts() -> None:
    """Only what ranks of this host have is mapped, and takes turns; every byte is right all the same."""
    num_rows = 3
    assert run_world(update_many_times, 6, 10, 3) == [2 * num_rows] * 6


@pytest.mark.parametrize(("transport", "num_nodes"), [("copy", 1), ("hybrid", 2)])
def test_every_pass_sees_whole_layers(transport: Literal["copy", "hybrid"], num_nodes: int) -> None:
    """Updates beside forward passes, one-sided: no pass ever sees a torn layer."""
    soak = Soak(num_updates=5, transport=transport, num_nodes=num_nodes, options=UpdateOptions(verify="off"))
    for result in run_world(soak_rank, 4, soak):
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert len(result.commits) == soak.num_updates * soak.num_layers


async def refuse(
    rank: int, memory: Callable[[torch.device], SharedMemory] | None, device: CpuDevice
) -> tuple[tuple[int, ...], str]:
    """Open a transport for small weights; return whom its error names, and what it says."""
    weights = ExpertWeights({0: [device.allocate(8).view(2, 4)]})
    transport = CopyEngineTransport() if memory is None else CopyEngineTransport(memory=memory)
    with pytest.raises(IpcUnavailable) as caught:
        await transport.open(device, ThreadWorkers(), weights, control_timeout_s=30)
    with pytest.raises(BrokenTransport):
        transport.launch(Exchange(0, ()))
    await transport.aclose()
    assert transport.rank == rank
    return caught.value.ranks, str(caught.value)


def refuse_in_world(
    world: WorldRank, what: Literal["no GPU", "no handle", "no mapping", "another host"]
) -> tuple[tuple[int, ...], str]:
    """Be a rank where something cannot be shared."""
    memory = SharedMemory()
    if what == "no GPU":
        return anyio.run(refuse, world.rank, None, CpuDevice())
    if what == "another host" and world.rank == 1:
        be_on_host(1)
    if what == "no mapping" and world.rank == 1:

        def refuse_to_map(handle: bytes) -> int:
            raise RuntimeError(f"no peer access to {len(handle)} bytes")

        memory.open = refuse_to_map  # type: ignore[method-assign]
    device = CpuDevice() if what == "no handle" and world.rank == 1 else memory
    outcome: tuple[tuple[int, ...], str] = anyio.run(refuse, world.rank, lambda _: memory, device)
    assert (memory.mapped, memory.mapped_host) == ({}, set())
    return outcome


@pytest.mark.parametrize(
    ("what", "ranks", "reason"),
    [
        ("no GPU", (0, 1), "weights are on cpu, and only CUDA devices share memory"),
        ("no handle", (1,), "rank 1: this memory cannot be shared"),
        ("no mapping", (1,), "rank 1: the weights of rank 0 cannot be mapped: no peer access"),
        ("another host", (0, 1), "rank 1 is on another host"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_all_ranks(
    what: Literal["no GPU", "no handle", "no mapping", "another host"],
    ranks: tuple[int, ...],
    reason: str,
) -> None:
    """Before anything moves, every rank is told which ranks cannot read, and why; nothing stays mapped."""
    for named, message in run_world(refuse_in_world, 2, what):
        assert named == ranks
        assert reason in message


class _Never:
    """A point that a device never passes."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise AssertionError("waits for ever")


class _Stuck(SharedMemory):
    """A device that does nothing any more, once it is stuck."""

    stuck = False

    def record(self) -> DeviceEvent:
        return _Never() if self.stuck else super().record()


async def be_stuck() -> None:
    """Launch copies that never end."""
    memory, workers = _Stuck(), ThreadWorkers()
    transport = CopyEngineTransport(memory=lambda _: memory)
    weights = ExpertWeights({0: [memory.allocate(8).view(2, 4)]})
    await transport.open(memory, workers, weights, control_timeout_s=30)
    memory.stuck = True
    pending = transport.launch(Exchange(0, ()))
    with pytest.raises(TransferTimeout) as caught:
        await pending.wait(0.05)
    assert (caught.value.layer, caught.value.timeout_s) == (0, 0.05)
    with pytest.raises(BrokenTransport):
        transport.launch(Exchange(0, ()))
    await transport.aclose()


def stuck_in_world(_: WorldRank) -> None:
    """Be a world of one."""
    anyio.run(be_stuck)


def test_copies_that_do_not_end_in_time_break_the_transport() -> None:
    """The error names the layer, and the transport is not used again."""
    run_world(stuck_in_world, 1)


async def wait_for_a_turn(rank: int) -> float:
    """Pull in turn from a peer that never launches; abort. Return how long the pull then took."""
    memory = SharedMemory()
    transport = CopyEngineTransport(memory=lambda _: memory)
    weights = ExpertWeights({0: [memory.allocate(8).view(2, 4)]})
    control = await transport.open(memory, ThreadWorkers(), weights, control_timeout_s=30)
    staging = StagingBuffer(0, memory.allocate(1024), memory)
    staging.lay_out([0], [4])
    took_s = 0.0
    if rank == 0:
        pending = transport.launch(Exchange(0, (), pulls=Pulls((Pull(2, 0, 0),), staging, in_turn=True)))
        started = anyio.Event()

        async def start_it() -> None:
            await pending.start()
            started.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_it)
            with anyio.move_on_after(0.2):
                await started.wait()
            assert not started.is_set()
            transport.abort()
            start = anyio.current_time()
        with pytest.raises(BrokenTransport):
            await pending.wait(30)
        took_s = anyio.current_time() - start
    await control.run(CountingVoter(rank, 1))
    await transport.aclose()
    assert memory.mapped_host == set()
    return took_s


def wait_for_a_turn_in_world(world: WorldRank) -> float:
    """Be one of three ranks."""
    return anyio.run(wait_for_a_turn, world.rank)


def test_a_rank_that_waits_for_its_turn_can_give_up() -> None:
    """Rank 1 reads from rank 2 first, and does not; an abort ends rank 0's wait for it."""
    assert run_world(wait_for_a_turn_in_world, 3)[0] < 10


async def send_messages() -> None:
    """Launch an exchange that has a message."""
    memory = SharedMemory()
    transport = CopyEngineTransport(memory=lambda _: memory)
    weights = ExpertWeights({0: [memory.allocate(8).view(2, 4)]})
    await transport.open(memory, ThreadWorkers(), weights, control_timeout_s=30)
    message = Message(0, 0, memory.allocate(4))
    with pytest.raises(BrokenTransport, match="moves no messages"):
        transport.launch(Exchange(0, (MessageGroup((message,), ()),)))
    await transport.aclose()


def send_in_world(_: WorldRank) -> None:
    """Be a world of one."""
    anyio.run(send_messages)


def test_messages_are_refused() -> None:
    """A one-sided transport would leave them where they are."""
    run_world(send_in_world, 1)


async def abort_before_the_end() -> None:
    """Abort between launch and wait."""
    memory = SharedMemory()
    transport = CopyEngineTransport(memory=lambda _: memory)
    weights = ExpertWeights({0: [memory.allocate(8).view(2, 4)]})
    await transport.open(memory, ThreadWorkers(), weights, control_timeout_s=30)
    pending = transport.launch(Exchange(0, ()))
    transport.abort()
    with pytest.raises(BrokenTransport):
        await pending.wait(30)
    await transport.aclose()


def aborted_in_world(_: WorldRank) -> None:
    """Be a world of one."""
    anyio.run(abort_before_the_end)


def test_an_aborted_transport_pulls_nothing() -> None:
    """What was launched and not yet pulled ends with an error."""
    run_world(aborted_in_world, 1)
