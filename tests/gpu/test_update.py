"""A whole update on a CUDA device: one rank, whose experts change their slots."""

import anyio
import pytest
import torch

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.testing.sample_model import SampleModel

TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
MODEL = SampleModel(hidden=256, intermediate=96)
ONE = ExpertPlacement.from_mapping([[0, 1, 2, 3, 4, 0]] * 4)
OTHER = ExpertPlacement.from_mapping([[4, 3, 2, 1, 0, 3], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 1]])


@pytest.mark.parametrize("verify", ["off", "checksum"])
def test_updates_there_and_back(cuda: torch.device, verify: str) -> None:
    """Every byte is right each time, and staging is made only once."""
    tensors = MODEL.weights(ONE, TOPOLOGY, 0, cuda)
    staging = set()

    async def main() -> None:
        (transport,) = MemoryTransport.world(1)
        options = UpdateOptions(verify=verify)
        async with ExpertUpdater(
            ExpertWeights(tensors), ONE, TOPOLOGY, rank=0, transport=transport, options=options
        ) as updater:
            for number in range(6):
                target = (OTHER, ONE)[number % 2]
                await updater.update(target)
                assert MODEL.wrong_slots(tensors, target, TOPOLOGY, 0) == []
                published = updater.expert_map.physical_to_logical_map
                assert published.tolist() == target.physical_to_logical_map.tolist()
                staging.add(updater.staging[0].memory.data_ptr())
            assert len(staging) == 1
            assert updater.expert_map.layer_generation.tolist() == [6, 6, 0, 6]

    anyio.run(main)
