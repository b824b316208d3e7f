"""How survivors of a failure agree again: compare layers, roll the one in doubt forward, fetch what is lost.

All survivors do this together, over a new transport, and none of them serves meanwhile. No step is trusted to have
happened on other ranks: each tells the others what it has, and all draw the same conclusion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from async_eplb.device import Device
from async_eplb.errors import (
    CommitFailed,
    EplbError,
    InvalidWeightSource,
    PlacementDisagreement,
    RankMismatch,
    Unrecoverable,
)
from async_eplb.expert_map import ExpertMap
from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.survivors import Home, by_layer, homes, vacated, with_homes, without_ranks
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.topology import EPTopology
from async_eplb.transport.base import ControlGroup
from async_eplb.transport.one_round import hold_round
from async_eplb.transport.renumbered import RenumberedControlGroup
from async_eplb.update.run import UpdateRun
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a recovery did on this rank; all but ``rolled_forward`` and ``loaded`` is the same on all ranks.

    :param ranks: ranks of the EP group that go on
    :param step: boundaries passed, by the rank that was ahead; the next is one more, on all ranks
    :param placement: what the survivors serve now; slots of ranks that are gone are empty
    :param rolled_forward: layers that a peer had committed, and this rank only now
    :param lost: layer → logical experts that no survivor held
    :param missing: layer → those of them that still nobody holds: without a source, with one that failed, or for
        want of slots
    :param loaded: layer → those that this rank has loaded from the source
    """

    ranks: tuple[int, ...]
    generation: int
    step: int
    placement: ExpertPlacement
    rolled_forward: tuple[int, ...] = ()
    lost: dict[int, tuple[int, ...]] = field(default_factory=dict)
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loaded: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where a recovery puts lost experts. Every rank knows this before any rank writes the first.

    :param number: of the recovery, equal on all ranks that took part in it
    :param placement: what all survivors have before lost experts are loaded; None before the first recovery
    :param complete: this rank is done with it
    :param proposed: the one that follows, if this rank has proposed it and does not know that all others have too
    """

    number: int = 0
    homes: tuple[Home, ...] = ()
    placement: ExpertPlacement | None = None
    complete: bool = False
    proposed: "Attempt | None" = None


@dataclass(slots=True)
class RankState:
    """What one rank has when it begins to recover.

    :param run: its last update, if that failed; with the staging that it kept
    :param attempt: where the last recovery put lost experts, or began to
    """

    rank: int
    topology: EPTopology
    placement: ExpertPlacement
    step: int
    generation: int
    run: UpdateRun | None
    weights: ExpertWeights
    expert_map: ExpertMap
    device: Device
    workers: Workers
    attempt: Attempt


async def recover(state: RankState, control: ControlGroup, source: WeightSource | None) -> Recovery:
    """Bring survivors to the same layers; returns when all of them are there.

    :param control: of the survivors
    :raises RankMismatch: if survivors are not in rank order in their transport
    :raises Unrecoverable: if one has committed a layer that another has no bytes of
    :raises PlacementDisagreement: if they serve different placements all the same
    :raises BrokenControlGroup: if one is lost meanwhile; recover without it
    """
    facts = [state.rank, state.step, state.generation, state.attempt.number, int(state.attempt.complete)]
    rows = await hold_round(control, [*facts, *_generations(state)])
    members = tuple(row[0] for row in rows)
    if sorted(set(members)) != list(members):
        raise RankMismatch(
            f"the transport's ranks are {list(members)} in the EP group; they must be in ascending order",
            expected=state.rank,
            actual=state.rank,
        )
    control = RenumberedControlGroup(control, members)
    numbers = [row[3] for row in rows]
    latest = max(numbers)
    _catch_up(state, latest)
    goal = [max(column) for column in zip(*(row[len(facts) :] for row in rows), strict=True)]
    rolled = await _roll_forward(state, control, members, goal)
    dead = [rank for rank in range(state.topology.num_ranks) if rank not in members]
    left = without_ranks(state.placement, state.topology, dead)
    if min(numbers) == latest and not all(row[4] for row in rows):
        left = vacated(left, state.attempt.homes)  # some ranks may have written there, others not
    attempt = Attempt(latest + 1, homes(left, state.topology, dead), left)
    state.attempt = replace(state.attempt, proposed=attempt)
    digests = tuple(row[0] for row in await hold_round(control, [int.from_bytes(left.digest()[:8]) >> 1]))
    if len(set(digests)) > 1:
        raise PlacementDisagreement(
            f"ranks {list(members)} serve different placements: digests {list(digests)}",
            digests=digests,
            ranks=members,
        )
    _begin_attempt(state, attempt)
    recovery = Recovery(
        ranks=members,
        generation=max(row[2] for row in rows),
        step=max(row[1] for row in rows),
        placement=left,
        lost=left.unplaced(),
    )
    loaded = await _fetch_lost(state, control, source)
    state.attempt = replace(state.attempt, complete=True)
    return Recovery(
        ranks=recovery.ranks,
        generation=recovery.generation,
        step=recovery.step,
        placement=state.placement,
        rolled_forward=rolled,
        lost=recovery.lost,
        missing=state.placement.unplaced(),
        loaded=loaded,
    )


def _generations(state: RankState) -> list[int]:
    """Return how often each layer has been replaced, or will be for what was agreed."""
    counts: list[int] = state.expert_map.layer_generation.tolist()
    for row in () if state.run is None else state.run.owed:
        counts[row] += 1
    return counts


async def _roll_forward(
    state: RankState, control: ControlGroup, members: tuple[int, ...], goal: list[int]
) -> tuple[int, ...]:
    """Commit the layers that any survivor has committed, from kept staging; return those that were behind here."""
    has: list[int] = state.expert_map.layer_generation.tolist()
    behind = [row for row, (mine, wanted) in enumerate(zip(has, goal, strict=True)) if mine < wanted]
    kept = () if state.run is None else tuple(layer.planned.row for layer in state.run.kept)
    follows = all(row in kept and goal[row] == has[row] + 1 for row in behind)
    can = [row[0] for row in await hold_round(control, [int(follows)])]
    if not all(can):
        ranks = tuple(rank for rank, able in zip(members, can, strict=True) if not able)
        raise Unrecoverable(
            f"ranks {list(ranks)} have no bytes of layers that others have committed; start these ranks anew",
            ranks=ranks,
            layers=tuple(behind),
        )
    if state.run is not None:
        try:
            await state.run.roll_forward(behind)
        finally:
            has = state.expert_map.layer_generation.tolist()
            done = tuple(row for row in behind if has[row] == goal[row])
            state.placement = state.placement.with_layers(state.run.target, done)
    return tuple(behind)


def _catch_up(state: RankState, latest: int) -> None:
    """Begin the attempt that this rank has proposed too, if others know that all have; none of them has got further.

    Whoever knows has seen that this rank proposed the same, and waits for it before it writes an expert.
    """
    proposed = state.attempt.proposed
    if proposed is not None and proposed.number == latest:
        _begin_attempt(state, proposed)


def _begin_attempt(state: RankState, attempt: Attempt) -> None:
    """Serve what all survivors have; slots where experts are loaded later may be empty by now."""
    placement = attempt.placement or state.placement
    for row in placement.changed_layers(state.placement):
        _publish(state, placement, row)
    state.placement = placement
    state.attempt = attempt


def _publish(state: RankState, placement: ExpertPlacement, row: int) -> None:
    """Publish a layer's maps; its generation stays, for it tells of updates only."""
    generation = state.expert_map.layer_generation[row].clone()
    with state.device.committing():
        state.expert_map.publish(row, state.expert_map.layer_maps(placement, row))
        state.expert_map.layer_generation[row] = generation
        state.device.record().synchronize()


async def _fetch_lost(
    state: RankState, control: ControlGroup, source: WeightSource | None
) -> dict[int, tuple[int, ...]]:
    """Load what nobody holds into slots that can be spared, layer by layer; return what this rank loaded."""
    loaded: dict[int, tuple[int, ...]] = {}
    able = all(row[0] for row in await hold_round(control, [int(source is not None)]))
    if source is None or not able:
        return loaded
    for layer, found in by_layer(state.attempt.homes).items():
        mine = [home for home in found if state.topology.rank_of(home.physical_expert) == state.rank]
        contents: list[tuple[Home, list[Tensor]]] = []
        failure: EplbError | None = None
        try:
            contents = await state.workers.run("transfer", partial(_load, state, source, mine))
        except InvalidWeightSource as error:
            failure = error
        if not all(row[0] for row in await hold_round(control, [int(failure is None)])):
            continue
        placement = with_homes(state.placement, found)
        try:
            await state.workers.run("commit", partial(_write, state, placement, found, contents))
        except Exception as error:
            raise CommitFailed(
                f"rank {state.rank}: lost experts of layer {layer} could not be written ({error}); recover anew",
                rank=state.rank,
                layer=layer,
                step=state.step,
            ) from error
        state.placement = placement
        if mine:
            loaded[layer] = tuple(home.logical_expert for home in mine)
    return loaded


def _load(state: RankState, source: WeightSource, mine: Sequence[Home]) -> list[tuple[Home, list[Tensor]]]:
    return [(home, _checked(state, home, _from_source(source, home))) for home in mine]


def _from_source(source: WeightSource, home: Home) -> Sequence[Tensor]:
    """Load an expert; whatever a source raises, the other ranks must hear of it."""
    try:
        return source.load(home.layer, home.logical_expert)
    except InvalidWeightSource:
        raise
    except Exception as error:
        raise InvalidWeightSource(
            f"layer {home.layer}, logical expert {home.logical_expert}: the source failed ({error!r})",
            layer=home.layer,
            logical_expert=home.logical_expert,
        ) from error


def _checked(state: RankState, home: Home, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return an expert's tensors as bytes, if they are as large as a slot's."""
    expected = state.weights.slot_nbytes(home.layer)
    actual = tuple(tensor.nbytes for tensor in tensors)
    if actual != expected:
        raise InvalidWeightSource(
            f"layer {home.layer}, logical expert {home.logical_expert}: the source's tensors have {list(actual)} "
            f"bytes, those of a slot {list(expected)}",
            layer=home.layer,
            logical_expert=home.logical_expert,
        )
    return [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]


@torch.no_grad()
def _write(
    state: RankState, placement: ExpertPlacement, found: Sequence[Home], contents: Sequence[tuple[Home, list[Tensor]]]
) -> None:
    """Write experts into their homes, which the map says are empty meanwhile."""
    layer = found[0].layer
    _publish(state, vacated(state.placement, found), layer)
    with state.device.committing():
        for home, tensors in contents:
            slot = home.physical_expert - state.topology.slots_of(state.rank).start
            for view, tensor in zip(state.weights.views(layer), tensors, strict=True):
                view[slot].copy_(tensor)
        _publish(state, placement, layer)
