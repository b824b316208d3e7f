"""Real processes over gloo: long runs of updates, an EP group that is not the world."""

import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch.distributed as dist
from support.updates import PLANNERS

from async_eplb import EPTopology, ExpertUpdater, ExpertWeights, TorchDistTransport, UpdateOptions
from async_eplb.errors import WorldError
from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.testing.sample_model import SampleModel, random_placement

MODEL = SampleModel(hidden=32, intermediate=16)


def update_many_times(world: WorldRank, num_nodes: int, num_updates: int) -> int:
    """Update to random placements over state that carries on; compare every byte each time."""
    topology = EPTopology(world.num_ranks, num_nodes, 3)
    options = UpdateOptions(verify="checksum")
    return anyio.run(_update_many_times, TorchDistTransport(), topology, world.rank, num_updates, options)


async def _update_many_times(
    transport: TorchDistTransport, topology: EPTopology, rank: int, num_updates: int, options: UpdateOptions
) -> int:
    rng = np.random.default_rng(topology.num_ranks)
    physical = topology.num_physical_experts
    placement = random_placement(rng, 3, physical, physical // 2 + 1)
    tensors = MODEL.weights(placement, topology, rank)
    async with ExpertUpdater(
        ExpertWeights(tensors), placement, topology, rank=rank, transport=transport, options=options
    ) as updater:
        for _ in range(num_updates):
            new = random_placement(rng, 3, physical, physical // 2 + 1, num_empty=int(rng.integers(0, 2)))
            await updater.update(new)
            assert MODEL.wrong_slots(tensors, new, topology, rank) == []
        assert updater.expert_map.physical_to_logical_map.tolist() == new.physical_to_logical_map.tolist()
    return num_updates


@pytest.mark.parametrize(("num_ranks", "num_nodes", "num_updates"), [(2, 1, 40), (4, 2, 40), (8, 4, 20)])
def test_many_updates_between_processes(num_ranks: int, num_nodes: int, num_updates: int) -> None:
    """Every byte of every slot is right after each of many consecutive updates."""
    assert run_world(update_many_times, num_ranks, num_nodes, num_updates) == [num_updates] * num_ranks


def update_with_every_planner(world: WorldRank, num_nodes: int, num_updates: int) -> int:
    """Update so many times with each planner; compare every byte each time."""
    topology = EPTopology(world.num_ranks, num_nodes, 3)
    for planner in PLANNERS:
        options = UpdateOptions(verify="checksum", planner=planner, operations_per_group=20)
        anyio.run(_update_many_times, TorchDistTransport(), topology, world.rank, num_updates, options)
    return len(PLANNERS)


@pytest.mark.parametrize(("num_ranks", "num_nodes", "num_updates"), [(4, 2, 3), (8, 2, 2)])
def test_every_planner_gives_the_same_weights_between_processes(
    num_ranks: int, num_nodes: int, num_updates: int
) -> None:
    """Every byte of every slot is right after each of several updates, in small groups."""
    assert run_world(update_with_every_planner, num_ranks, num_nodes, num_updates) == [len(PLANNERS)] * num_ranks


def update_in_a_subgroup(world: WorldRank) -> None:
    """Ranks 1 and 3 of the world are an EP group of two."""
    group = dist.new_group([1, 3])
    if world.rank in (1, 3):
        transport = TorchDistTransport(group)
        anyio.run(_update_many_times, transport, EPTopology(2, 1, 4), world.rank // 2, 5, UpdateOptions())


def test_an_ep_group_that_is_not_the_world() -> None:
    """Ranks are those of the group."""
    run_world(update_in_a_subgroup, 4)


def conform(world: WorldRank) -> None:
    """Run the conformance suite over gloo."""
    anyio.run(lambda: check_transport(TorchDistTransport(backend="gloo"), seed=world.num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gloo_keeps_the_contract(num_ranks: int) -> None:
    """The conformance suite over real sockets."""
    run_world(conform, num_ranks)


def fail_on_rank_one(world: WorldRank) -> None:
    """Fail where the others wait."""
    if world.rank == 1:
        raise ValueError("one is enough")
    dist.barrier()


def hold(world: WorldRank) -> None:
    """Say that this rank is there, and stay."""
    os.write(1, f"{world.rank}\n".encode())
    time.sleep(600)


def test_a_world_whose_owner_is_killed_leaves_no_process() -> None:
    """Its output ends, which it does when the last process that could write there is gone."""
    code = "import sys; sys.path.append('processes'); import test_world as t; t.run_world(t.hold, 2)"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        try:
            assert {owner.stdout.readline(), owner.stdout.readline()} == {"0\n", "1\n"}
        finally:
            owner.kill()
        assert owner.stdout.read() == ""


def test_a_failing_process_is_reported() -> None:
    """The error names the rank and carries its traceback."""
    with pytest.raises(WorldError, match="one is enough") as caught:
        run_world(fail_on_rank_one, 2)
    assert caught.value.rank == 1
