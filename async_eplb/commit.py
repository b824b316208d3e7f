"""Staged buffers → live weights, then publish: the only code that writes what the model reads."""

import torch

from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.staging import BufferState, StagingBuffer
from async_eplb.weights import ExpertWeights


@torch.no_grad()
def commit_layer(
    row: int,
    plan: LayerPlan,
    buffer: StagingBuffer,
    weights: ExpertWeights,
    expert_map: ExpertMap,
    maps: LayerMaps,
) -> int:
    """Copy a layer's staged slots into the live weights and publish its maps, all on the current stream.

    The layer must be staged on every rank.

    :returns: bytes written to live weights
    :raises EplbError: if the buffer is not STAGED
    """
    buffer.enter(BufferState.COMMITTING)
    live = weights.views(row)
    sources = [(slot, slot) for slot in plan.staged_slots]
    sources += [(fan_out.staged_slot, fan_out.dst_slot) for fan_out in plan.fan_outs]
    for staged_slot, live_slot in sources:
        for view, staged in zip(live, buffer.views(staged_slot), strict=True):
            view[live_slot].copy_(staged)
    expert_map.publish(row, maps)
    return len(sources) * sum(weights.slot_nbytes(row))
