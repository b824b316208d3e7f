"""The log schema, one dataclass an event.

Event names are ``eplb.<noun>.<past tense>``; keys are flat and numbers carry their unit in the name. A field's
annotation is its description in EVENTS.md, which is generated from these classes.
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Annotated, ClassVar

SCHEMA_VERSION = 1
"""Larger by one whenever a key changes its meaning or goes away; new events and keys leave it as it is."""

STAMPS = {
    "event": "name of the event",
    "schema_version": f"version of this schema: {SCHEMA_VERSION}",
    "run_id": "an updater's life, from open to close; the same on all its ranks",
    "monotonic_s": "seconds on the host's monotonic clock, when the event was emitted: at the end of what it reports",
    "wall_s": "seconds since 1970 on the host's wall clock, at the same time",
}
"""Keys that every logged event has besides its fields, and what they mean."""

LINK_NBYTES = {
    "sent_nbytes_within_node": ("sent", "within_node"),
    "sent_nbytes_across_nodes": ("sent", "across_nodes"),
    "received_nbytes_within_node": ("received", "within_node"),
    "received_nbytes_across_nodes": ("received", "across_nodes"),
}
"""Keys of bytes between ranks, of a transfer and of an update → direction and kind of link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    :cvar name: the event's name in the log
    :cvar level: level that it is logged at: ``"debug"``, ``"info"`` or ``"warning"``
    """

    name: ClassVar[str]
    level: ClassVar[str] = "info"

    generation: Annotated[int, "number of the update, from 1; of a rebalance, of the last update begun"]
    rank: Annotated[int, "EP rank that logs"]
    layer: Annotated[int | None, "row of the placement; null if the event is not about one layer"] = None
    step: Annotated[int, "step boundaries that the rank has passed; of a commit, the boundary that it was made at"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStarted(Event):
    """An update begins: all ranks have the same inputs and staging is allocated."""

    name: ClassVar[str] = "eplb.update.started"

    mode: Annotated[str, "`serving`: commits at step boundaries; `exclusive`: at once, the model stands still"]
    num_ranks: Annotated[int, "ranks of the EP group"]
    num_nodes: Annotated[int, "nodes that they are on"]
    num_layers: Annotated[int, "layers that change"]
    num_unchanged_layers: Annotated[int, "layers that are skipped"]
    staging_nbytes: Annotated[int, "size of all staging buffers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInputsLogged(Event):
    """The inputs of an update (option ``log_inputs``)."""

    name: ClassVar[str] = "eplb.update.inputs_logged"

    num_ranks: Annotated[int, "ranks of the EP group"]
    num_nodes: Annotated[int, "nodes that they are on"]
    num_ranks_per_node: Annotated[int, "ranks of each node"]
    num_local_physical_experts: Annotated[int, "slots of each rank"]
    weight_shapes: Annotated[dict[int, list[list[int]]], "layer → shapes of its tensors"]
    staged_slots: Annotated[list[int], "slots that are staged, of each layer in `layers`"]
    layers: Annotated[list[int], "layers that change, in update order"]
    old_physical_to_logical_map: Annotated[list[list[int]], "of each layer in `layers`, before"]
    new_physical_to_logical_map: Annotated[list[list[int]], "of each layer in `layers`, after"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlanned(Event):
    """A layer's plan is ready."""

    name: ClassVar[str] = "eplb.layer.planned"

    layer: Annotated[int, "row of the placement"]
    duration_ms: Annotated[float, "time of the planning thread, queueing included"]
    num_same_gpu: Annotated[int, "slots copied from this rank"]
    num_free_rider: Annotated[int, "slots filled from what another slot of this rank receives"]
    num_same_node: Annotated[int, "slots received from this node"]
    num_cross_node: Annotated[int, "slots received from other nodes"]
    num_sends: Annotated[int, "experts sent to other ranks, counted for each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecided(Event):
    """Every decision of a layer's plan (option ``log_decisions``)."""

    name: ClassVar[str] = "eplb.layer.decided"
    level: ClassVar[str] = "debug"

    layer: Annotated[int, "row of the placement"]
    slot_sources: Annotated[list[str], "where each local slot's expert comes from"]
    local_copies: Annotated[list[dict[str, int]], "copies between slots of this rank"]
    recvs: Annotated[list[dict[str, int]], "receives, in slot order"]
    sends: Annotated[list[dict[str, int]], "sends, in the order of logical experts"]
    fan_outs: Annotated[list[dict[str, int]], "slots filled from what another slot receives"]
    relays: Annotated[list[dict[str, int]], "sends from staging of what this rank receives"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTransferred(Event):
    """A layer is staged on this rank. Bytes are those that its plan moves."""

    name: ClassVar[str] = "eplb.layer.transferred"

    layer: Annotated[int, "row of the placement"]
    duration_ms: Annotated[float, "from its turn, when the layer before is staged, until its staging is full"]
    copied_nbytes: Annotated[int, "copied from own slots"]
    sent_nbytes: Annotated[int, "sent to all ranks together"]
    sent_to_ranks: Annotated[list[int], "ranks that something was sent to, ascending"]
    sent_nbytes_by_rank: Annotated[list[int], "bytes sent to each of these"]
    sent_nbytes_by_node: Annotated[list[int], "bytes sent to each node of the group"]
    sent_nbytes_within_node: Annotated[int, "bytes sent to ranks of this node"]
    sent_nbytes_across_nodes: Annotated[int, "bytes sent to ranks of other nodes"]
    received_nbytes: Annotated[int, "received from all ranks together"]
    received_from_ranks: Annotated[list[int], "ranks that something was received from, ascending"]
    received_nbytes_by_rank: Annotated[list[int], "bytes received from each of these"]
    received_nbytes_by_node: Annotated[list[int], "bytes received from each node of the group"]
    received_nbytes_within_node: Annotated[int, "bytes received from ranks of this node"]
    received_nbytes_across_nodes: Annotated[int, "bytes received from ranks of other nodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCommitted(Event):
    """A layer is new on this rank: weights, maps and generation. ``step`` is 0 in the exclusive mode."""

    name: ClassVar[str] = "eplb.layer.committed"

    layer: Annotated[int, "row of the placement"]
    duration_ms: Annotated[
        float, "from its turn, once launched and the one before done, until the device has finished it"
    ]
    copy_ms: Annotated[float, "host time of launching it; in the serving mode, of the serving thread"]
    wait_ms: Annotated[float, "from staged on this rank until the commit's turn"]
    num_slots: Annotated[int, "slots written"]
    nbytes: Annotated[int, "bytes written to live weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFinished(Event):
    """All layers of an update are committed on every rank. Times are sums over layers."""

    name: ClassVar[str] = "eplb.update.finished"

    duration_ms: Annotated[float, "of the update"]
    plan_ms: Annotated[float, "planning"]
    transfer_ms: Annotated[float, "transfers"]
    wait_ms: Annotated[float, "staged layers waiting for their commit"]
    commit_ms: Annotated[float, "commits"]
    overlap: Annotated[float, "plan, transfer and commit time over the duration: 1 if one ran after another"]
    num_layers: Annotated[int, "layers committed"]
    sent_nbytes_within_node: Annotated[int, "bytes sent to ranks of this node"]
    sent_nbytes_across_nodes: Annotated[int, "bytes sent to ranks of other nodes"]
    received_nbytes_within_node: Annotated[int, "bytes received from ranks of this node"]
    received_nbytes_across_nodes: Annotated[int, "bytes received from ranks of other nodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFailed(Event):
    """An update ended early; ``committed_layers`` are new on every rank, all others old."""

    name: ClassVar[str] = "eplb.update.failed"
    level: ClassVar[str] = "warning"

    duration_ms: Annotated[float, "of the update"]
    error: Annotated[str, "name of the exception"]
    error_message: Annotated[str, "message of the exception"]
    committed_layers: Annotated[list[int], "layers that are new, in update order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStalled(Event):
    """A stage made no progress for ``progress_timeout_s``: the update fails. Each such stage is reported once.

    ``stages`` lists the work of each stage, ``rank_states`` the state of each rank in the last control round.
    """

    name: ClassVar[str] = "eplb.update.stalled"
    level: ClassVar[str] = "warning"

    layer: Annotated[int, "row of the placement"]
    stage: Annotated[str, "`plan`, `transfer`, `relay`, `agree` or `commit`"]
    doing: Annotated[str, "work of the stage"]
    duration_ms: Annotated[float, "limit of one piece of work of a stage"]
    stages: Annotated[list[str], "work of each stage and its layer, longest first"]
    buffers: Annotated[list[str], "each staging buffer with its state"]
    rank_states: Annotated[list[str], "state of each rank in the last control round, by rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceWaited(Event):
    """A step had to wait at its fence until a control round was over; the lead is now larger."""

    name: ClassVar[str] = "eplb.fence.waited"
    level: ClassVar[str] = "warning"

    duration_ms: Annotated[float, "how long the step waited"]
    lead: Annotated[int, "boundaries from a rank's last one to its next fence, from now on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassesTimed(Event):
    """Forward passes of one rank, from step to step: those beside an update, or up to a minute of others.

    A pass is beside an update that was under way at its beginning or its end. Time in `idle()` and `paused()`, of an
    update of the exclusive mode, and without a step for 5 s is not counted.
    """

    name: ClassVar[str] = "eplb.passes.timed"

    beside: Annotated[str, "`update`: they were beside the update `generation`; `nothing`: beside none"]
    num_passes: Annotated[int, "passes"]
    num_pauses: Annotated[int, "times without a step for 5 s"]
    mean_ms: Annotated[float, "mean time of a pass"]
    p50_ms: Annotated[float, "time that half of them took at most, right to a fifth"]
    p99_ms: Annotated[float, "the same of 99 in 100"]
    max_ms: Annotated[float, "longest"]
    times_ms: Annotated[list[float], "mean times of passes that took about as long as each other, ascending"]
    num_passes_by_time: Annotated[list[int], "number of passes of each of these"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceFinished(Event):
    """A rebalance is over; if ``moved``, all its layers are committed on every rank."""

    name: ClassVar[str] = "eplb.rebalance.finished"

    number: Annotated[int, "of the rebalance, from 1"]
    duration_ms: Annotated[float, "load, policy, decision and update"]
    moved: Annotated[bool, "whether weights were moved: `generation` is then that update's"]
    num_layers: Annotated[int, "layers that were moved"]
    balancedness_before: Annotated[float, "mean over the maximum of ranks' loads, mean of all layers"]
    balancedness_after: Annotated[float, "the same under the placement that is now in use"]


class Reason(Enum):
    """Why a rebalance was chosen or not."""

    PAYS = "pays"
    BALANCED = "balanced"
    NO_GAIN = "no_gain"
    DOES_NOT_PAY = "does_not_pay"


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceEvaluated(Event):
    """A candidate placement was compared with the current one: its gain, its cost, and whether it pays.

    ``num_slots`` are those of the layers that would change; balancedness is the mean over the maximum of ranks' loads.
    """

    name: ClassVar[str] = "eplb.rebalance.evaluated"

    policy: Annotated[str, "policy that chose the candidate"]
    pays: Annotated[bool, "whether it will be moved to"]
    reason: Annotated[str, "reason of the decision"]
    num_layers: Annotated[int, "layers of the model"]
    num_changed_layers: Annotated[int, "layers that would change"]
    mean_balancedness_before: Annotated[float, "mean of all layers, now"]
    mean_balancedness_after: Annotated[float, "mean of all layers, under the candidate"]
    min_balancedness_before: Annotated[float, "of the worst layer, now"]
    min_balancedness_after: Annotated[float, "of the worst layer, under the candidate"]
    num_receives: Annotated[int, "experts that ranks would receive"]
    num_slots: Annotated[int, "slots of the layers that would change"]
    received_nbytes: Annotated[int, "bytes that all ranks would receive"]
    transfer_ms: Annotated[float, "estimated time of all transfers"]
    saved_ms_per_step: Annotated[float, "estimated time that each step gets shorter"]
    horizon_steps: Annotated[int, "steps that the placement is expected to serve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDropped(Event):
    """Events are in no line of a JSON log: the disk was full, or writing was slower than logging.

    ``generation``, ``rank`` and ``step`` are those of the first event that was lost.
    """

    name: ClassVar[str] = "eplb.log.dropped"
    level: ClassVar[str] = "warning"

    num_events: Annotated[int, "events lost since the last one that was written"]
    error: Annotated[str, "why an event was lost last; empty if writing was only slow"]


EVENTS: tuple[type[Event], ...] = (
    UpdateStarted,
    UpdateInputsLogged,
    LayerPlanned,
    LayerDecided,
    LayerTransferred,
    LayerCommitted,
    UpdateFinished,
    UpdateFailed,
    UpdateStalled,
    FenceWaited,
    PassesTimed,
    RebalanceFinished,
    RebalanceEvaluated,
    LogDropped,
)


def field_names(event: type[Event]) -> tuple[str, ...]:
    """Return the names of an event's fields, in order."""
    return tuple(field.name for field in fields(event))
