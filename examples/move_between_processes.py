"""Move expert weights between four processes, and print each layer as it lands on rank 0.

Layer n goes to a placement that is shifted by n, so layer 0 does not change and costs nothing.

    $ python examples/move_between_processes.py
    layer 1 has landed: 3 slots, 73.8 kB
    layer 2 has landed: 3 slots, 73.8 kB
    layer 3 has landed: 3 slots, 73.8 kB
    every slot of every rank holds its expert
"""

import anyio
import torch

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, TorchDistTransport, UpdateOptions
from async_eplb.testing import World, WorldRank

NUM_LAYERS, NUM_EXPERTS = 4, 8
TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=3)
OLD = ExpertPlacement.trivial(NUM_LAYERS, TOPOLOGY.num_physical_experts, NUM_EXPERTS)
NEW = ExpertPlacement.from_mapping(
    [[(physical + layer) % NUM_EXPERTS for physical in range(12)] for layer in range(NUM_LAYERS)]
)


def weights_of(placement: ExpertPlacement, rank: int) -> dict[int, list[torch.Tensor]]:
    """Return two tensors for each layer, [slots, ...], filled with the number of the slot's expert."""
    local = torch.tensor(placement.physical_to_logical_map[:, TOPOLOGY.slots_of(rank)])
    shapes = ((128, 64), (64, 64))
    return {
        layer: [experts.view(-1, 1, 1).repeat(1, *shape).to(torch.bfloat16) for shape in shapes]
        for layer, experts in enumerate(local)
    }


async def move(world: WorldRank) -> bool:
    """Be one rank: move the weights, tell of each layer, return whether every slot is right."""
    tensors = weights_of(OLD, world.rank)
    updater = ExpertUpdater(
        ExpertWeights(tensors, names=["w13", "w2"]),
        OLD,
        TOPOLOGY,
        rank=world.rank,
        transport=TorchDistTransport(),
        options=UpdateOptions(verify="checksum"),
    )
    async with updater:
        async for landed in updater.stream(NEW):
            if world.rank == 0:
                world.send(f"layer {landed.layer} has landed: {landed.num_slots} slots, {landed.nbytes / 1e3:.1f} kB")
    wanted = weights_of(NEW, world.rank)
    return all(all(map(torch.equal, tensors[layer], wanted[layer])) for layer in wanted)


def rank_main(world: WorldRank) -> bool:
    """Start the event loop of one process."""
    return anyio.run(move, world)


def main() -> None:
    """Run the processes and print what they tell."""
    right = World(TOPOLOGY.num_ranks, on_message=lambda _rank, line: print(line)).run(rank_main)
    print("every slot of every rank holds its expert" if all(right) else f"ranks that are right: {right}")


if __name__ == "__main__":
    main()
