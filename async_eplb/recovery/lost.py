"""Experts that no survivor holds: loaded from a source into slots that can be spared."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from async_eplb.errors import CommitFailed, EplbError, InvalidWeightSource
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.survivors import Home, by_layer, vacated, with_homes
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.slots import slot_tensor
from async_eplb.transport.base import ControlGroup
from async_eplb.transport.one_round import hold_round
from async_eplb.update.rank import Rank
from async_eplb.update.state import RankState
from async_eplb.workers import Work


def publish(rank: Rank, placement: ExpertPlacement, row: int) -> None:
    """Publish a layer's maps beside the model; the layer's generation stays, for it counts updates only."""
    generation = rank.expert_map.layer_generation[row].clone()
    with rank.device.committing():
        rank.expert_map.publish(row, rank.expert_map.staged(rank.expert_map.layer_maps(placement, row)))
        rank.expert_map.layer_generation[row] = generation
        rank.device.record().synchronize()


async def fetch_lost(
    rank: Rank,
    state: RankState,
    homes: Sequence[Home],
    control: ControlGroup,
    source: WeightSource | None,
    *,
    step: int,
) -> dict[int, tuple[int, ...]]:
    """Load experts that nobody holds into slots that can be spared, layer by layer.

    :returns: layer → logical experts that this rank has loaded
    :raises CommitFailed: if an expert cannot be written
    """
    loaded: dict[int, tuple[int, ...]] = {}
    able = all(row[0] for row in await hold_round(control, [int(source is not None)]))
    if source is None or not able:
        return loaded
    for layer, found in by_layer(homes).items():
        mine = [home for home in found if rank.topology.rank_of(home.physical_expert) == rank.number]
        contents: list[tuple[Home, list[Tensor]]] = []
        failure: EplbError | None = None
        try:
            contents = await rank.workers.run(Work.TRANSFER, partial(_load, rank, source, mine))
        except InvalidWeightSource as error:
            failure = error
        if not all(row[0] for row in await hold_round(control, [int(failure is None)])):
            continue
        placement = with_homes(state.placement, found)
        try:
            await rank.workers.run(
                "commit", partial(_write, rank, vacated(state.placement, found), placement, contents)
            )
        except Exception as error:
            raise CommitFailed(
                f"rank {rank.number}: lost experts of layer {layer} could not be written ({error}); recover anew",
                rank=rank.number,
                layer=layer,
                step=step,
            ) from error
        state.placement = placement
        if mine:
            loaded[layer] = tuple(home.logical_expert for home in mine)
    return loaded


def _load(rank: Rank, source: WeightSource, mine: Sequence[Home]) -> list[tuple[Home, list[Tensor]]]:
    return [(home, _from_source(rank, source, home)) for home in mine]


def _from_source(rank: Rank, source: WeightSource, home: Home) -> list[Tensor]:
    """Load an expert; whatever a source raises or returns, the other ranks must hear of it."""
    try:
        return _checked(rank, home, source.load(home.layer, home.logical_expert))
    except InvalidWeightSource:
        raise
    except Exception as error:
        raise InvalidWeightSource(
            f"layer {home.layer}, logical expert {home.logical_expert}: the source failed ({error!r})",
            layer=home.layer,
            logical_expert=home.logical_expert,
        ) from error


def _checked(rank: Rank, home: Home, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the bytes of an expert's elements, in the shapes of a slot's elements, if they fit there."""
    slots = rank.live.slot_elements(home.layer, 0)
    given = [slot_tensor([tensor], f"tensor {n}", device=None).elements(0) for n, tensor in enumerate(tensors)]
    if len(given) != len(slots) or not all(map(_fits, given, slots)):
        actual, expected = ([list(each.shape) for each in tensors] for tensors in (given, slots))
        raise InvalidWeightSource(
            f"layer {home.layer}, logical expert {home.logical_expert}: the source's tensors have shapes {actual}, "
            f"those of a slot {expected}; the last size is the bytes of an element",
            layer=home.layer,
            logical_expert=home.logical_expert,
        )
    return [each.reshape(slot.shape) for each, slot in zip(given, slots, strict=True)]


def _fits(given: Tensor, slot: Tensor) -> bool:
    """Return whether an expert has a slot's bytes and, unless these lie in row-major order, its shape."""
    return given.numel() == slot.numel() and (slot.is_contiguous() or given.shape == slot.shape)


@torch.no_grad()
def _write(
    rank: Rank, empty: ExpertPlacement, filled: ExpertPlacement, contents: Sequence[tuple[Home, list[Tensor]]]
) -> None:
    """Write experts into their homes, which the map says are empty meanwhile.

    :param contents: of one layer, this rank's, as bytes of elements
    """
    (layer,) = filled.changed_layers(empty)
    publish(rank, empty, layer)
    with rank.device.committing():
        for home, tensors in contents:
            slot = home.physical_expert - rank.slots.start
            for elements, tensor in zip(rank.live.slot_elements(layer, slot), tensors, strict=True):
                elements.copy_(tensor)
        publish(rank, filled, layer)
