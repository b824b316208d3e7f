"""A captured forward pass keeps working, bit for bit, while layers are committed between its replays."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertWeights
from async_eplb.commit.committer import Committer, CopyCommitter, committer_for
from async_eplb.device import CudaDevice
from async_eplb.expert_map import ExpertMap
from async_eplb.plan import plan_layer
from async_eplb.staging import BufferSize, BufferState, StagingPool
from async_eplb.testing.sample_model import random_placement

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, WIDTH, NUM_TOKENS = 3, 12, 16, 64, 40
TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=NUM_SLOTS)
NUM_COMMITS = 200


class Model:
    """Layers of experts, one of them for each token; an expert is a matrix and the number that scales it."""

    def __init__(self, placement: ExpertPlacement, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        experts = torch.randn(NUM_LAYERS, NUM_EXPERTS, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        scales = torch.rand(NUM_LAYERS, NUM_EXPERTS, generator=generator) + 0.5
        held = [torch.from_numpy(row.copy()) for row in placement.physical_to_logical_map]
        self.matrices = [experts[layer, row].to(device, torch.bfloat16) for layer, row in enumerate(held)]
        self.scales = [scales[layer, row].to(device) for layer, row in enumerate(held)]
        self.weights = ExpertWeights({row: [self.matrices[row], self.scales[row]] for row in range(NUM_LAYERS)})
        self.expert_map = ExpertMap(placement, TOPOLOGY, rank=0, device=device)
        self.experts_of_tokens = torch.randint(NUM_EXPERTS, (NUM_LAYERS, NUM_TOKENS), generator=generator).to(device)
        self.inputs = torch.randn(NUM_TOKENS, 1, WIDTH, generator=generator).to(device, torch.bfloat16)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output, and the map that it was computed with."""
        hidden = self.inputs
        for layer in range(NUM_LAYERS):
            slots = self.expert_map.logical_to_dispatch_physical_map[layer][self.experts_of_tokens[layer]]
            hidden = torch.tanh(torch.bmm(hidden, self.matrices[layer][slots]) * self.scales[layer][slots, None, None])
            hidden = hidden.to(torch.bfloat16)
        return hidden, self.expert_map.physical_to_logical_map.clone()


def commits(
    model: Model, placements: Sequence[ExpertPlacement], device: CudaDevice, committer: Committer
) -> list[Callable[[], int]]:
    """Return commits that lead from each placement to the next, one layer at a time, round and round the layers.

    Each fills its staging from the live slots first; only the commit itself is on the stream that is current then.
    """
    slot_nbytes = model.weights.slot_nbytes(0)  # of every layer
    size = BufferSize(StagingPool.layer_nbytes(NUM_SLOTS, slot_nbytes), committer.scratch_nbytes(0))
    pool = StagingPool(2, device, size)
    pool.allocate()
    rows = [placements[0].physical_to_logical_map[layer] for layer in range(NUM_LAYERS)]

    def commit(number: int) -> int:
        layer, new = number % NUM_LAYERS, placements[number + 1]
        buffer = pool.buffers[number % 2]
        buffer.consumed.synchronize()
        buffer.state = BufferState.FILLING
        plan = plan_layer(rows[layer], new.physical_to_logical_map[layer], TOPOLOGY, 0)
        rows[layer] = new.physical_to_logical_map[layer]
        buffer.lay_out(plan.staged_slots, slot_nbytes)
        maps = model.expert_map.layer_maps(new, layer)
        callers_work = device.record()
        with device.transferring():
            device.wait(callers_work)
            for copy in plan.local_copies:
                live = model.weights.slot_views(layer, copy.src_slot)
                for view, staged in zip(live, buffer.views(copy.dst_slot), strict=True):
                    staged.copy_(view)
            prepared = committer.prepare(layer, plan, buffer, maps)
            device.record().synchronize()
        buffer.enter(BufferState.STAGED)
        nbytes = prepared.run()
        buffer.consumed = device.record()
        return nbytes

    return [lambda number=number: commit(number) for number in range(len(placements) - 1)]  # type: ignore[misc]


@pytest.mark.parametrize("committer", [committer_for, CopyCommitter])
def test_replays_between_commits_are_bit_exact(
    cuda: torch.device, committer: Callable[[ExpertWeights, ExpertMap], Committer]
) -> None:
    """Every replay gives the output of an unmoved model, from the map of the commits before it."""
    rng = np.random.default_rng(0)
    placements = [random_placement(rng, NUM_LAYERS, NUM_SLOTS, NUM_EXPERTS) for _ in range(NUM_COMMITS + 1)]
    device = CudaDevice(cuda)
    model = Model(placements[0], cuda)
    made = committer(model.weights, model.expert_map)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        expected = model.forward()[0].clone()
        with torch.cuda.graph(graph, stream=stream):
            output, seen = model.forward()
        outcomes, maps = [], [placements[0].physical_to_logical_map.copy()]
        for number, commit in enumerate(commits(model, placements, device, made)):
            layer = number % NUM_LAYERS
            assert commit() > 0
            graph.replay()
            outcomes.append((output.clone(), seen.clone()))
            maps.append(maps[-1].copy())
            maps[-1][layer] = placements[number + 1].physical_to_logical_map[layer]
    stream.synchronize()
    assert len(outcomes) == NUM_COMMITS
    for (replayed, published), row in zip(outcomes, maps[1:], strict=True):
        assert published.tolist() == row.tolist()
        assert torch.equal(replayed, expected)
