"""Process groups that torch's registry does not know, all ranks of them in this process."""

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, Transport, UpdateOptions
from async_eplb.testing.sample_model import SampleModel

TINY = SampleModel(hidden=8, intermediate=4)


def stateless_groups(num_ranks: int, store: Store | None = None) -> list[ProcessGroup]:
    """Return a group as each of its ranks has it, over a store that they share."""
    shared = PrefixStore("group", store or dist.HashStore())  # type: ignore[attr-defined]
    return [ProcessGroup(shared, rank, num_ranks) for rank in range(num_ranks)]


def small_updater(
    transport: Transport, *, name: str | None = None, model: SampleModel = TINY, open_timeout_s: float = 30.0
) -> ExpertUpdater:
    """Return an updater of one layer with two slots a rank; which one follows from its transport."""
    topology = EPTopology(transport.num_ranks, 1, 2)
    placement = ExpertPlacement.trivial(1, topology.num_physical_experts, topology.num_physical_experts)
    return ExpertUpdater(
        ExpertWeights(model.weights(placement, topology, transport.rank)),
        placement,
        topology,
        rank=transport.rank,
        name=name,
        transport=transport,
        options=UpdateOptions(open_timeout_s=open_timeout_s),
    )
