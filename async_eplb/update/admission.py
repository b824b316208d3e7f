"""What must fit together before an updater connects, and before an update moves a byte."""

import hashlib
from collections.abc import Iterable

from async_eplb.agreement.rules import Mode
from async_eplb.errors import (
    InvalidOptions,
    InvalidPlacement,
    LayerCountMismatch,
    MissingWeights,
    RankMismatch,
    SlotCountMismatch,
    UnplacedExpert,
)
from async_eplb.expert_map import ExpertMap
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.weights import ExpertWeights


def changed_rows(
    old: ExpertPlacement,
    new: ExpertPlacement,
    layers: Iterable[int] | None,
    *,
    weights: ExpertWeights,
    topology: EPTopology,
    expert_map: ExpertMap,
) -> tuple[int, ...]:
    """Return the layers that an update changes, after all checks that need no other rank.

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


def update_digest(
    old: ExpertPlacement,
    new: ExpertPlacement,
    rows: tuple[int, ...],
    *,
    mode: Mode,
    weights: ExpertWeights,
    topology: EPTopology,
    options: UpdateOptions,
) -> int:
    """Condense what must be equal on all ranks into 63 bits."""
    wire = (mode.value, options.verify, options.planner, options.staging_depth, options.operations_per_group)
    content = hashlib.blake2b(digest_size=8)
    for part in (old.digest(), new.digest(), weights.digest()):
        content.update(part)
    content.update(repr((topology, rows, wire)).encode())
    return int.from_bytes(content.digest()) >> 1


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
            f"{topology.num_local_physical_experts} local physical experts",
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
