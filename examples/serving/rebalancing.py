"""Where experts should go, for updates that everything waits for: the measured load, spread greedily."""

import heapq

import numpy as np
import numpy.typing as npt

from async_eplb import EPTopology, ExpertPlacement


def spread(load: npt.NDArray[np.integer], topology: EPTopology) -> ExpertPlacement:
    """Give hot experts more replicas, and each rank about the same load.

    :param load: tokens of each logical expert, ``[layers, logical]``
    """
    return ExpertPlacement.from_mapping([_spread_layer(row, topology) for row in load + 1], load.shape[1])


def _spread_layer(load: npt.NDArray[np.integer], topology: EPTopology) -> list[int]:
    """Split the hottest expert until slots are used up; then place the hottest replica on the least loaded rank."""
    counts = np.ones(len(load), dtype=np.int64)
    for _ in range(topology.num_physical_experts - len(load)):
        counts[np.argmax(load / counts)] += 1
    replicas = sorted(np.arange(len(load)).repeat(counts).tolist(), key=lambda expert: -load[expert] / counts[expert])
    ranks: list[list[int]] = [[] for _ in range(topology.num_ranks)]
    heap = [(0.0, rank) for rank in range(topology.num_ranks)]
    for expert in replicas:
        total, rank = heapq.heappop(heap)
        ranks[rank].append(expert)
        if len(ranks[rank]) < topology.num_local_physical_experts:
            heapq.heappush(heap, (total + float(load[expert] / counts[expert]), rank))
    return [expert for held in ranks for expert in held]
