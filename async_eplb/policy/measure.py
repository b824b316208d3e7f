"""What a placement means for a load: cost of each rank, balance of each layer, and what it takes to get there."""

import numpy as np

from async_eplb.load.value import ExpertLoad
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.policy.check import require_same_model
from async_eplb.policy.objective import FloatArray, IntArray, Objective, tokens
from async_eplb.topology import EPTopology


def rank_costs(
    load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology, objective: Objective = tokens
) -> FloatArray:
    """Return the cost of each rank in one step: float64 ``[layers, ranks]``.

    A logical expert's tokens spread evenly over its replicas; the cost of a rank is the sum over its slots. With the
    default objective it is tokens a step.

    :raises InvalidLoad: if load and placement have different layers or experts
    :raises InvalidPlacement: if the placement does not fit the topology
    """
    placement.require_fit(topology)
    costs = slot_costs(load, placement, objective)
    return np.asarray(costs.reshape(len(costs), topology.num_ranks, -1).sum(axis=2))


def slot_costs(load: ExpertLoad, placement: ExpertPlacement, objective: Objective = tokens) -> FloatArray:
    """Return the cost of each slot in one step: float64 ``[layers, physical]``, 0 where empty.

    :raises InvalidLoad: if load and placement have different layers or experts
    """
    require_same_model(load, placement)
    maps = placement.physical_to_logical_map
    cost = objective(load.tokens_per_step() / np.maximum(placement.replica_counts(), 1))
    held = np.take_along_axis(cost, np.maximum(maps, 0).astype(np.int64), axis=1)
    return np.where(maps == EMPTY_SLOT, 0.0, held)


def balancedness(
    load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology, objective: Objective = tokens
) -> FloatArray:
    """Return the mean over the maximum of the ranks' costs, of each layer: float64 ``[layers]``, at most 1.

    1 where a layer has no load. The other arguments and errors are those of :func:`rank_costs`.
    """
    costs = rank_costs(load, placement, topology, objective)
    peak = costs.max(axis=1)
    return np.asarray(np.divide(costs.mean(axis=1), peak, out=np.ones(len(costs)), where=peak > 0))


def receives(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology) -> IntArray:
    """Count the experts that each rank has to receive, which it did not hold before: int64 ``[layers, ranks]``.

    An expert that several slots of a rank want is received once.

    :raises InvalidPlacement: if a placement does not fit the topology
    """
    for placement in (old, new):
        placement.require_fit(topology)
    shape = (new.num_layers, topology.num_ranks, topology.num_local_physical_experts)
    before, after = (p.physical_to_logical_map.reshape(shape) for p in (old, new))
    held = (after[..., :, None] == before[..., None, :]).any(axis=3)
    again = np.tril(after[..., :, None] == after[..., None, :], k=-1).any(axis=3)
    return np.asarray((~held & ~again & (after != EMPTY_SLOT)).sum(axis=2), dtype=np.int64)
