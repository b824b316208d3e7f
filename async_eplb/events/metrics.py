"""Events → Prometheus metrics, through the client library (extra ``metrics``)."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from async_eplb.errors import (
    BrokenControlGroup,
    BrokenTransport,
    CanaryMismatch,
    ChecksumMismatch,
    CommitFailed,
    EplbError,
    GenerationMismatch,
    InvalidOptions,
    MissingExtra,
    PlacementDisagreement,
    SkippedPass,
    StepMismatch,
    TransferTimeout,
    UpdateAborted,
    UpdateCancelled,
    UpdateNotBegun,
    UpdateStalled,
    VerificationError,
)
from async_eplb.events.passes import BOUNDS_MS
from async_eplb.events.schema import (
    LINK_NBYTES,
    FenceWaited,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
    PassesTimed,
    Reason,
    RebalanceEvaluated,
    RebalanceFinished,
    UpdateFailed,
    UpdateFinished,
)
from async_eplb.events.stages import COMMIT, FENCE, STAGES

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_UPDATE_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STAGE_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_PASS_BUCKETS = tuple(bound / 1e3 for bound in BOUNDS_MS[::4])
_STALL_BUCKETS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25)

_FAULTS: tuple[type[EplbError], ...] = (
    UpdateCancelled,
    BrokenControlGroup,
    GenerationMismatch,
    UpdateNotBegun,
    PlacementDisagreement,
    SkippedPass,
    StepMismatch,
    CommitFailed,
    UpdateStalled,
    TransferTimeout,
    BrokenTransport,
    VerificationError,
    CanaryMismatch,
    ChecksumMismatch,
    UpdateAborted,
)
"""Errors that are known to end updates."""


class Metrics:
    """Counts events as Prometheus metrics; an observer for :class:`async_eplb.events.event_logger.EventLogger`.

    Pass ``EventLogger(observers=[Metrics(registry)])`` to all updaters and rebalancers of the process as their logger.
    The label ``updater`` is an updater's name, so that those of a target and a draft model can be told apart. Metrics
    count events of this process only; labels that Prometheus adds distinguish processes.

    :param registry: registry of the metrics; without it, the default one of the client library
    :param updaters: names whose counters are 0 from now on, so that even the first fault is an increase; those of other
        updaters begin with their first event
    :raises InvalidOptions: if the registry has metrics of these names already
    :raises MissingExtra: without prometheus-client
    """

    def __init__(self, registry: "CollectorRegistry | None" = None, *, updaters: Iterable[str] = ("",)) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtra(
                "metrics need prometheus-client; pip install 'async-eplb[metrics]'", extra="metrics"
            ) from error
        self._update_seconds = Histogram(
            "eplb_update_duration_seconds",
            "Time of updates",
            ["outcome", "updater"],
            registry=None,
            buckets=_UPDATE_BUCKETS,
        )
        self._stage_seconds = Histogram(
            "eplb_layer_stage_duration_seconds",
            "Time of one layer in a stage",
            ["stage", "updater"],
            registry=None,
            buckets=_STAGE_BUCKETS,
        )
        self._stall_seconds = Histogram(
            "eplb_serving_stall_seconds",
            "Host time that a commit or a wait at a fence took from the serving thread",
            ["cause", "updater"],
            registry=None,
            buckets=_STALL_BUCKETS,
        )
        self._pass_seconds = Histogram(
            "eplb_pass_duration_seconds",
            "Time of forward passes, beside an update or nothing",
            ["beside", "updater"],
            registry=None,
            buckets=_PASS_BUCKETS,
        )
        self._bytes = Counter(
            "eplb_transferred_bytes", "Bytes between ranks", ["direction", "link", "updater"], registry=None
        )
        self._committed = Counter("eplb_committed_bytes", "Bytes written to live weights", ["updater"], registry=None)
        self._faults = Counter("eplb_update_faults", "Updates that ended early", ["error", "updater"], registry=None)
        self._rebalances = Counter(
            "eplb_rebalances", "Decisions about a new placement", ["reason", "updater"], registry=None
        )
        self._balancedness = Gauge(
            "eplb_balancedness_ratio",
            "Mean over maximum of ranks' loads, mean of layers",
            ["when", "updater"],
            registry=None,
        )
        self._register(REGISTRY if registry is None else registry)
        self._counted: set[str] = set()
        for updater in updaters:
            self._begin_with(updater)
        self._observers: dict[str, Callable[[Mapping[str, Any], str], None]] = {
            LayerPlanned.name: self._stages,
            LayerTransferred.name: self._transferred,
            LayerCommitted.name: self._commit,
            FenceWaited.name: lambda e, updater: self._stall(FENCE.name, e["duration_ms"], updater),
            PassesTimed.name: self._passes,
            UpdateFinished.name: lambda e, updater: self._update("finished", e["duration_ms"], updater),
            UpdateFailed.name: self._failed,
            RebalanceEvaluated.name: lambda e, updater: self._rebalances.labels(e["reason"], updater).inc(),
            RebalanceFinished.name: self._rebalanced,
        }

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Count an event."""
        observe = self._observers.get(event["event"])
        if observe is not None:
            updater = str(event.get("updater", ""))
            self._begin_with(updater)
            observe(event, updater)

    def _register(self, registry: "CollectorRegistry") -> None:
        """Register all metrics, or none."""
        metrics = [each for each in vars(self).values() if hasattr(each, "collect")]
        for number, metric in enumerate(metrics):
            try:
                registry.register(metric)
            except ValueError as error:
                for registered in metrics[:number]:
                    registry.unregister(registered)
                raise InvalidOptions(
                    f"the registry has such metrics already ({error}); let all updaters of a process share one "
                    "Metrics, which tells them apart by their names, or give each its own registry",
                    option="registry",
                ) from error

    def _begin_with(self, updater: str) -> None:
        """Make the counters of an updater that are known beforehand."""
        if updater in self._counted:
            return
        self._counted.add(updater)
        for metric, values in (
            (self._update_seconds, ("finished", "failed")),
            (self._stage_seconds, [stage.name for stage in STAGES]),
            (self._stall_seconds, (COMMIT.name, FENCE.name)),
            (self._pass_seconds, ("update", "nothing")),
            (self._faults, [error.__name__ for error in _FAULTS]),
            (self._rebalances, [reason.value for reason in Reason]),
        ):
            for value in values:
                metric.labels(value, updater)
        for labels in LINK_NBYTES.values():
            self._bytes.labels(*labels, updater)
        self._committed.labels(updater)

    def _stages(self, event: Mapping[str, Any], updater: str) -> None:
        for stage in STAGES:
            if stage.event.name == event["event"]:
                self._stage_seconds.labels(stage.name, updater).observe(event[stage.duration] / 1e3)

    def _stall(self, cause: str, ms: float, updater: str) -> None:
        self._stall_seconds.labels(cause, updater).observe(ms / 1e3)

    def _passes(self, event: Mapping[str, Any], updater: str) -> None:
        observe = self._pass_seconds.labels(event["beside"], updater).observe
        for ms, num in zip(event["times_ms"], event["num_passes_by_time"], strict=True):
            for _ in range(num):
                observe(ms / 1e3)

    def _update(self, outcome: str, ms: float, updater: str) -> None:
        self._update_seconds.labels(outcome, updater).observe(ms / 1e3)

    def _transferred(self, event: Mapping[str, Any], updater: str) -> None:
        self._stages(event, updater)
        for key, labels in LINK_NBYTES.items():
            self._bytes.labels(*labels, updater).inc(event[key])

    def _commit(self, event: Mapping[str, Any], updater: str) -> None:
        self._stages(event, updater)
        self._committed.labels(updater).inc(event["nbytes"])
        if event["step"]:
            self._stall(COMMIT.name, event["copy_ms"], updater)

    def _failed(self, event: Mapping[str, Any], updater: str) -> None:
        self._update("failed", event["duration_ms"], updater)
        self._faults.labels(event["error"], updater).inc()

    def _rebalanced(self, event: Mapping[str, Any], updater: str) -> None:
        for when in ("before", "after"):
            self._balancedness.labels(when, updater).set(event[f"balancedness_{when}"])
