"""The log schema, one dataclass an event, and how an event is emitted.

Event names are ``eplb.<noun>.<past tense>``; keys are flat and numbers carry their unit in the name. Lists of
bytes are indexed by rank or by node. Emitting goes through a structlog logger of the caller's choice; importing
this package configures nothing.
"""

import logging
from dataclasses import dataclass, fields
from typing import ClassVar

import structlog
from structlog.typing import FilteringBoundLogger

Logger = FilteringBoundLogger


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; :attr:`name` is the event's name in the log, :attr:`level` the method it is logged by."""

    name: ClassVar[str]
    level: ClassVar[str] = "info"

    generation: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStarted(Event):
    """An update begins: all ranks have the same inputs and staging is allocated."""

    name: ClassVar[str] = "eplb.update.started"

    num_layers: int
    num_unchanged_layers: int
    staging_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInputsLogged(Event):
    """What an update works on (option ``log_inputs``)."""

    name: ClassVar[str] = "eplb.update.inputs_logged"

    num_ranks: int
    num_nodes: int
    num_ranks_per_node: int
    num_local_physical_experts: int
    weight_shapes: dict[int, list[list[int]]]
    staged_slots: list[int]
    layers: list[int]
    old_physical_to_logical_map: list[list[int]]
    new_physical_to_logical_map: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlanned(Event):
    """A layer's plan is ready."""

    name: ClassVar[str] = "eplb.layer.planned"

    layer: int
    duration_ms: float
    num_same_gpu: int
    num_free_rider: int
    num_same_node: int
    num_cross_node: int
    num_sends: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecided(Event):
    """Every decision of a layer's plan (option ``log_decisions``)."""

    name: ClassVar[str] = "eplb.layer.decided"
    level: ClassVar[str] = "debug"

    layer: int
    slot_sources: list[str]
    local_copies: list[dict[str, int]]
    recvs: list[dict[str, int]]
    sends: list[dict[str, int]]
    fan_outs: list[dict[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTransferred(Event):
    """A layer is staged on this rank."""

    name: ClassVar[str] = "eplb.layer.transferred"

    layer: int
    duration_ms: float
    copied_nbytes: int
    sent_nbytes: int
    sent_nbytes_by_rank: list[int]
    sent_nbytes_by_node: list[int]
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes: int
    received_nbytes_by_rank: list[int]
    received_nbytes_by_node: list[int]
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCommitted(Event):
    """A layer is new on this rank: weights, maps and generation. ``step`` is 0 in the exclusive mode."""

    name: ClassVar[str] = "eplb.layer.committed"

    layer: int
    step: int
    duration_ms: float
    copy_ms: float
    wait_ms: float
    num_slots: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFinished(Event):
    """All layers of an update are committed on every rank."""

    name: ClassVar[str] = "eplb.update.finished"

    duration_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    overlap: float
    num_layers: int
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFailed(Event):
    """An update ended early; ``committed_layers`` are new on every rank, all others old."""

    name: ClassVar[str] = "eplb.update.failed"
    level: ClassVar[str] = "warning"

    duration_ms: float
    error: str
    error_message: str
    committed_layers: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStalled(Event):
    """A stage made no progress for ``progress_timeout_s``: the update fails.

    ``stages`` says what each stage does, ``rank_states`` what each rank said in the last control round.
    """

    name: ClassVar[str] = "eplb.update.stalled"
    level: ClassVar[str] = "error"

    layer: int
    stage: str
    doing: str
    duration_ms: float
    stages: list[str]
    buffers: list[str]
    rank_states: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceWaited(Event):
    """A step had to wait at its fence until a control round was over; the lead is now larger."""

    name: ClassVar[str] = "eplb.fence.waited"
    level: ClassVar[str] = "warning"

    step: int
    duration_ms: float
    lead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceFinished(Event):
    """A rebalance is over; if ``moved``, all its layers are committed on every rank."""

    name: ClassVar[str] = "eplb.rebalance.finished"

    number: int
    duration_ms: float
    moved: bool
    num_layers: int
    balancedness_before: float
    balancedness_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceEvaluated(Event):
    """A candidate placement was weighed: what it would bring, what it would cost, and whether it pays.

    ``num_slots`` are those of the layers that would change; balancedness is the mean over the maximum of ranks' loads.
    """

    name: ClassVar[str] = "eplb.rebalance.evaluated"

    policy: str
    pays: bool
    reason: str
    num_layers: int
    num_changed_layers: int
    mean_balancedness_before: float
    mean_balancedness_after: float
    min_balancedness_before: float
    min_balancedness_after: float
    num_receives: int
    num_slots: int
    received_nbytes: int
    transfer_ms: float
    saved_ms_per_step: float
    horizon_steps: int


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
    RebalanceFinished,
    RebalanceEvaluated,
)


def emit(logger: Logger, event: Event) -> None:
    """Log an event under its name, its fields as flat keys."""
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    getattr(logger, event.level)(event.name, **values)


def default_logger() -> Logger:
    """Return the logger for callers that pass none: the application's structlog, else its standard logging.

    An application that configured neither sees only the names of warnings and errors.
    """
    if structlog.is_configured():
        logger: Logger = structlog.get_logger("async_eplb")
        return logger
    wrapped: Logger = structlog.wrap_logger(
        logging.getLogger("async_eplb"),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return wrapped
