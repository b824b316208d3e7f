"""Measure placements: the cost of each rank under a load, the balance of each layer, and receives to get there."""

import numpy as np
from einops import rearrange, reduce

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
    costs = slot_costs(load, placement, objective)  # [layers, physical]
    return reduce(costs, "layers (ranks slots) -> layers ranks", "sum", ranks=topology.num_ranks)


def slot_costs(load: ExpertLoad, placement: ExpertPlacement, objective: Objective = tokens) -> FloatArray:
    """Return the cost of each slot in one step: float64 ``[layers, physical]``, 0 where empty.

    :raises InvalidLoad: if load and placement have different layers or experts
    """
    require_same_model(load, placement)
    maps = placement.physical_to_logical_map  # [layers, physical]
    cost = objective(load.tokens_per_step() / np.maximum(placement.replica_counts(), 1))  # [layers, experts]
    held = np.take_along_axis(cost, np.maximum(maps, 0).astype(np.int64), axis=1)
    return np.where(maps == EMPTY_SLOT, 0.0, held)


def balancedness(
    load: ExpertLoad, placement: ExpertPlacement, topology: EPTopology, objective: Objective = tokens
) -> FloatArray:
    """Return the mean over the maximum of the ranks' costs, of each layer: float64 ``[layers]``, at most 1.

    1 where a layer has no load. The other arguments and errors are those of :func:`rank_costs`.
    """
    costs = rank_costs(load, placement, topology, objective)  # [layers, ranks]
    peak = costs.max(axis=1)  # [layers]
    return np.asarray(np.divide(costs.mean(axis=1), peak, out=np.ones(len(costs)), where=peak > 0))


def receives(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology) -> IntArray:
    """Count the experts that each rank has to receive, which it did not hold before: int64 ``[layers, ranks]``.

    An expert that several slots of a rank want is received once.

    :raises InvalidPlacement: if a placement does not fit the topology
    """
    for placement in (old, new):
        placement.require_fit(topology)
    before, after = (  # both [layers, ranks, slots]
        rearrange(p.physical_to_logical_map, "layers (ranks slots) -> layers ranks slots", ranks=topology.num_ranks)
        for p in (old, new)
    )
    held = (after[..., :, None] == before[..., None, :]).any(axis=3)  # [layers, ranks, slots]
    again = np.tril(after[..., :, None] == after[..., None, :], k=-1).any(axis=3)  # a lower slot wants the same
    return np.asarray((~held & ~again & (after != EMPTY_SLOT)).sum(axis=2), dtype=np.int64)
