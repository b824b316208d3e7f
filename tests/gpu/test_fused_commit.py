"""The commit as one kernel launch: the same bytes as plain copies, nothing allocated, little host time."""

import time
from importlib.util import find_spec
from statistics import median

import pytest
import torch
from support.layouts import ROW, random_layer

from async_eplb.commit.committer import Committer, CopyCommitter, committer_for
from async_eplb.device import device_for
from async_eplb.expert_map import ExpertMap
from async_eplb.scratch import Scratch
from async_eplb.staging import BufferState
from async_eplb.weights import ExpertWeights

HOST_LIMIT_US = 40


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def fused(weights: ExpertWeights, expert_map: ExpertMap) -> Committer:
    made = committer_for(weights, expert_map)
    assert type(made).__name__ == "FusedCommitter"
    return made


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("aligned", [False, True])
def test_it_does_what_plain_copies_do(cuda: torch.device, seed: int, *, aligned: bool) -> None:
    """Weights, the gaps between slots, all maps and generations are, bit by bit, what the CPU makes of it."""
    expected = random_layer(seed, aligned=aligned)
    layer = random_layer(seed, cuda, fused, aligned=aligned)
    assert layer.commit.run() == expected.commit.run()
    assert all(map(torch.equal, layer.state(), expected.state()))


@pytest.mark.parametrize("seed", range(20))
def test_plain_copies_do_the_same_on_the_device(cuda: torch.device, seed: int) -> None:
    """What is used without Triton."""
    expected, layer = random_layer(seed), random_layer(seed, cuda, CopyCommitter)
    assert layer.commit.run() == expected.commit.run()
    assert all(map(torch.equal, layer.state(), expected.state()))


def test_large_slots(cuda: torch.device) -> None:
    """Many programs, of all kinds at once."""
    for seed in range(3):
        expected = random_layer(seed, max_elements=3_000_000)
        layer = random_layer(seed, cuda, fused, max_elements=3_000_000)
        assert layer.commit.run() == expected.commit.run()
        assert all(map(torch.equal, layer.state(), expected.state()))


def test_it_runs_on_the_current_stream(cuda: torch.device) -> None:
    """Behind what that stream has to do, and before what it gets next."""
    expected, layer = random_layer(1), random_layer(1, cuda, fused)
    expected.commit.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        before = layer.expert_map.layer_generation.clone()
        layer.commit.run()
        after = layer.expert_map.layer_generation.clone()
        assert not stream.query()
    stream.synchronize()
    assert (before.tolist(), after.tolist()) == ([0, 0], [0, 1])
    assert all(map(torch.equal, layer.state(), expected.state()))


def test_nothing_is_allocated_on_the_device(cuda: torch.device) -> None:
    """Neither when a layer's table is made nor when it is committed."""
    layer = random_layer(2, cuda)
    committer = committer_for(layer.weights, layer.expert_map)
    layer.buffer.scratch = Scratch(device_for(cuda), committer.scratch_nbytes(ROW))

    def num_allocations() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    before = num_allocations()
    for _ in range(5):
        layer.buffer.scratch.clear()
        committer.prepare(ROW, layer.plan, layer.buffer, layer.maps).run()
        layer.buffer.state = BufferState.STAGED
    torch.cuda.synchronize()
    assert num_allocations() == before
    assert layer.expert_map.layer_generation.tolist() == [0, 5]


def test_the_serving_thread_gives_little_time(cuda: torch.device) -> None:
    """Whatever the layer has of slots and tensors."""
    layer = random_layer(3, cuda, fused)
    times_us = []
    for _ in range(300):
        layer.buffer.state = BufferState.STAGED
        torch.cuda.synchronize()
        start = time.perf_counter()
        layer.commit.run()
        times_us.append((time.perf_counter() - start) * 1e6)
    assert median(times_us) <= HOST_LIMIT_US
