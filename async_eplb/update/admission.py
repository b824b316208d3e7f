"""Checks before an updater connects, and before an update moves a byte; and the values that have passed them."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from async_eplb.agreement.rules import Mode
from async_eplb.arguments import OrNone, SetOf, Whole, settle, take
from async_eplb.commit.committer import committer_for
from async_eplb.device import Device, DeviceEvent, device_for
from async_eplb.errors import (
    DeadRankPlaced,
    InvalidOptions,
    InvalidPlacement,
    LayerCountMismatch,
    MissingWeights,
    RankMismatch,
    SlotCountMismatch,
    UnplacedExpert,
)
from async_eplb.events.emit import GuardedLogger
from async_eplb.expert_map import ExpertMap, LayerCommit
from async_eplb.map_tables import MapTables
from async_eplb.modes import outside_modes
from async_eplb.options import UpdateOptions, canonical
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.update.rank import Rank
from async_eplb.update.reserve import buffer_size, require_staging
from async_eplb.verify.column import Verifier, Verify
from async_eplb.weights import ExpertWeights, require_weights
from async_eplb.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """The arguments of one update, as a caller gives them.

    :param mode: whether the model serves meanwhile
    :param layers: rows to update; all without it
    :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each step at most; None: no limit
    :param after: work of the caller that comes before live weights are read
    :raises InvalidOptions: if ``max_nbytes_per_step`` is no whole number of at least 1, or a layer none
    """

    mode: Mode
    new: ExpertPlacement
    layers: Iterable[int] | None
    max_nbytes_per_step: int | None
    after: DeviceEvent

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, layers=OrNone(SetOf(Whole(0))), max_nbytes_per_step=OrNone(Whole(1)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """One update, as all ranks must have it; only ``after`` is this rank's own.

    :param generation: number of the update, from 1
    :param old: placement that the live weights have
    :param new: placement that they shall have
    :param rows: layers that change, in update order
    :param digest: of all that must be equal on all ranks
    """

    generation: int
    mode: Mode
    old: ExpertPlacement
    new: ExpertPlacement
    rows: tuple[int, ...]
    digest: int
    after: DeviceEvent
    max_nbytes_per_step: int | None


def admit(
    request: Request, rank: Rank, old: ExpertPlacement, *, transport: Transport, gone: Collection[int], generation: int
) -> Update:
    """Return the update that a request makes, after all checks that need no other rank.

    :param old: placement that the live weights have
    :param gone: ranks that were lost
    :raises EplbError: a child of it for each way in which the request does not fit; nothing has changed
    """
    rank.live.require_in_place()
    require_empty(request.new, rank.topology, gone)
    require_relays(rank.options, transport)
    rows = changed_rows(
        old, request.new, request.layers, weights=rank.weights, topology=rank.topology, expert_map=rank.expert_map
    )
    require_staging(old, request.new, rows, weights=rank.weights, topology=rank.topology, size=rank.buffer_size)
    return Update(
        generation=generation,
        mode=request.mode,
        old=old,
        new=request.new,
        rows=rows,
        digest=update_digest(old, request.new, rows, mode=request.mode, rank=rank),
        after=request.after,
        max_nbytes_per_step=request.max_nbytes_per_step,
    )


@outside_modes()
def admit_rank(
    weights: ExpertWeights,
    placement: ExpertPlacement,
    topology: EPTopology,
    *,
    number: int,
    name: str | None,
    transport: Transport,
    options: UpdateOptions,
    on_commit: Callable[[LayerCommit], None],
    tables: MapTables | None,
    logger: GuardedLogger,
    workers: Workers,
    device: Device | None,
) -> Rank:
    """Return a rank whose parts fit together; device memory for maps and verification is allocated, not staging.

    :param device: that of the weights without it
    :raises EplbError: a child of it for each way in which they do not
    """
    require_name(name)
    require_weights(weights)
    device = device or device_for(weights.device)
    number = take(number, Whole(0), "rank", InvalidOptions)
    require_ranks(topology, number, transport)
    placement.require_fit(topology)
    require_slots(weights, placement, topology)
    verifier = Verifier(Verify(options.verify), weights, number)
    require_groups(verifier.weights, options)
    expert_map = ExpertMap(
        placement,
        topology,
        rank=number,
        device=weights.device,
        max_replicas=options.max_replicas,
        seed=options.dispatch_seed,
        tables=tables,
    )
    committer = committer_for(verifier.weights, expert_map)
    return Rank(
        number=number,
        name=name,
        topology=topology,
        live=weights,
        verifier=verifier,
        expert_map=expert_map,
        committer=committer,
        buffer_size=buffer_size(committer, verifier, options),
        device=device,
        workers=workers,
        logger=logger,
        options=options,
        on_commit=on_commit,
    )


@outside_modes()
def rebound(rank: Rank, weights: ExpertWeights) -> Rank:
    """Return a rank with other live weights; its maps stay, for the model reads them (rule 7). Blocks.

    :raises InvalidWeights: if the weights are not laid out as those before
    """
    rank.live.require_alike(weights)
    with rank.device.committing():
        verifier = Verifier(rank.verifier.mode, weights, rank.number)
        committer = committer_for(verifier.weights, rank.expert_map)
        rank.device.record().synchronize()
    return replace(rank, live=weights, verifier=verifier, committer=committer)


def changed_rows(
    old: ExpertPlacement,
    new: ExpertPlacement,
    layers: Iterable[int] | None,
    *,
    weights: ExpertWeights,
    topology: EPTopology,
    expert_map: ExpertMap,
) -> tuple[int, ...]:
    """Return the layers that an update changes.

    :param layers: rows to update; all without it
    :raises EplbError: a child of it for each way in which the placement does not fit
    """
    if new.num_layers != old.num_layers:
        raise LayerCountMismatch(
            f"the new placement has {new.num_layers} layers, the current one {old.num_layers}",
            expected=old.num_layers,
            actual=new.num_layers,
        )
    if new.num_logical_experts != old.num_logical_experts:
        raise InvalidPlacement(
            f"the new placement is for {new.num_logical_experts} logical experts, the current one for "
            f"{old.num_logical_experts}",
        )
    new.require_fit(topology)
    changed = new.changed_layers(old)
    chosen = set(changed if layers is None else layers)
    beyond = sorted(chosen - set(range(old.num_layers)))
    if beyond:
        raise MissingWeights(
            f"layers {beyond} are not rows of the placement, which has {old.num_layers}", layer=beyond[0]
        )
    for row in sorted(chosen - set(weights.rows)):
        raise MissingWeights(f"layer {row} is to be updated, but the updater was given no weights for it", layer=row)
    changed = tuple(row for row in changed if row in chosen)
    for row, missing in new.unplaced().items():
        if row in changed:
            raise UnplacedExpert(
                f"layer {row}: logical experts {list(missing)} have no replica in the new placement",
                layer=row,
                logical_experts=missing,
            )
    expert_map.require_room(new)
    return changed


def update_digest(old: ExpertPlacement, new: ExpertPlacement, rows: tuple[int, ...], *, mode: Mode, rank: Rank) -> int:
    """Condense what must be equal on all ranks into 63 bits (rule 23: from canonical values)."""
    wire = {
        "mode": mode.value,
        "rows": rows,
        "topology": canonical(rank.topology),
        "options": rank.options.wire(),
        "buffer_nbytes": rank.buffer_size.slots_nbytes,
    }
    content = hashlib.blake2b(digest_size=8)
    for part in (old.digest(), new.digest(), rank.weights.digest()):
        content.update(part)
    content.update(json.dumps(wire, sort_keys=True).encode())
    return int.from_bytes(content.digest()) >> 1


def require_empty(placement: ExpertPlacement, topology: EPTopology, gone: Iterable[int]) -> None:
    """Check that a placement leaves the slots of ranks that are gone empty.

    :raises DeadRankPlaced: if not
    """
    for rank in gone:
        used = np.argwhere(placement.physical_to_logical_map[:, topology.slots_of(rank)] != EMPTY_SLOT)
        if len(used):
            layer = int(used[0][0])
            raise DeadRankPlaced(
                f"layer {layer}: the new placement uses slots of rank {rank}, which is lost; place the survivors' "
                "slots only (async_eplb.on_survivors)",
                layer=layer,
                rank=rank,
            )


def require_name(name: object) -> None:
    """Check that an updater's name is a text, or that it has none.

    :raises InvalidOptions: if not
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise InvalidOptions(f"name is {name!r}; it must be a text that is not empty, or None", option="name")


def require_ranks(topology: EPTopology, rank: int, transport: Transport) -> None:
    """Check that topology, rank and transport speak of the same EP group.

    :raises RankMismatch: if not
    """
    for what, expected, actual in (
        ("ranks", topology.num_ranks, transport.num_ranks),
        ("rank", rank, transport.rank),
    ):
        if expected != actual:
            raise RankMismatch(
                f"{what} is {expected} for the updater and {actual} for its transport's group; "
                "the number of ranks cannot change while an updater lives",
                expected=expected,
                actual=actual,
            )


def require_slots(weights: ExpertWeights, placement: ExpertPlacement, topology: EPTopology) -> None:
    """Check that weights have a slot for each local physical expert, and a row of the placement for each layer.

    :raises SlotCountMismatch: if the first dimension is another
    :raises InvalidPlacement: if there are weights for other rows
    """
    if weights.num_local_physical_experts != topology.num_local_physical_experts:
        raise SlotCountMismatch(
            f"the weights' first dimension is {weights.num_local_physical_experts}, but each rank has "
            f"{topology.num_local_physical_experts} local physical experts; where each expert has a tensor of its own, "
            "give a list of these for each tensor of a row",
            tensor="all",
            expected=topology.num_local_physical_experts,
            actual=weights.num_local_physical_experts,
        )
    beyond = [row for row in weights.rows if not 0 <= row < placement.num_layers]
    if beyond:
        raise InvalidPlacement(
            f"there are weights for rows {beyond}, but the placement has rows 0 to {placement.num_layers - 1}"
        )


def require_groups(weights: ExpertWeights, options: UpdateOptions) -> None:
    """Check that one expert's tensors fit in a group of operations.

    :raises InvalidOptions: if not
    """
    widest = max(len(weights.slot_nbytes(row)) for row in weights.rows)
    if options.operations_per_group < widest:
        raise InvalidOptions(
            f"operations_per_group is {options.operations_per_group}; an expert alone is {widest} tensors",
            option="operations_per_group",
        )


def require_relays(options: UpdateOptions, transport: Transport) -> None:
    """Check that an open transport sends from staging if the planner relays.

    :raises InvalidOptions: if not
    """
    if options.planner.relays and transport.launch_rule.needs_grant:
        raise InvalidOptions(
            f"planner relays, but receivers of {transport!r} read live weights only; choose other sources, "
            "or a transport that sends",
            option="planner",
        )
