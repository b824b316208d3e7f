"""Events → Prometheus metrics, through the client library (extra ``metrics``)."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from async_eplb.errors import MissingExtra
from async_eplb.events.schema import (
    LINK_NBYTES,
    FenceWaited,
    LayerCommitted,
    LayerPlanned,
    LayerTransferred,
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
_STALL_BUCKETS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25)


class Metrics:
    """Counts events as Prometheus metrics; an observer for :class:`async_eplb.events.event_logger.EventLogger`.

    Pass ``EventLogger(observers=[Metrics(registry)])`` to updater and rebalancer as their logger. Metrics count
    events of this process only; labels that Prometheus adds distinguish processes.

    :param registry: registry of the metrics; without it, the default one of the client library
    :raises MissingExtra: without prometheus-client
    """

    def __init__(self, registry: "CollectorRegistry | None" = None) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtra(
                "metrics need prometheus-client; pip install 'async-eplb[metrics]'", extra="metrics"
            ) from error
        into = REGISTRY if registry is None else registry
        self._update_seconds = Histogram(
            "eplb_update_duration_seconds",
            "Time of updates",
            ["outcome"],
            registry=into,
            buckets=_UPDATE_BUCKETS,
        )
        self._stage_seconds = Histogram(
            "eplb_layer_stage_duration_seconds",
            "Time of one layer in a stage",
            ["stage"],
            registry=into,
            buckets=_STAGE_BUCKETS,
        )
        self._stall_seconds = Histogram(
            "eplb_serving_stall_seconds",
            "Host time that a commit or a wait at a fence took from the serving thread",
            ["cause"],
            registry=into,
            buckets=_STALL_BUCKETS,
        )
        self._bytes = Counter("eplb_transferred_bytes", "Bytes between ranks", ["direction", "link"], registry=into)
        self._committed = Counter("eplb_committed_bytes", "Bytes written to live weights", registry=into)
        self._faults = Counter("eplb_update_faults", "Updates that ended early", ["error"], registry=into)
        self._rebalances = Counter("eplb_rebalances", "Decisions about a new placement", ["reason"], registry=into)
        self._balancedness = Gauge(
            "eplb_balancedness_ratio", "Mean over maximum of ranks' loads, mean of layers", ["when"], registry=into
        )
        self._observers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            LayerPlanned.name: self._stages,
            LayerTransferred.name: self._transferred,
            LayerCommitted.name: self._commit,
            FenceWaited.name: lambda e: self._stall(FENCE.name, e["duration_ms"]),
            UpdateFinished.name: lambda e: self._update("finished", e["duration_ms"]),
            UpdateFailed.name: self._failed,
            RebalanceEvaluated.name: lambda e: self._rebalances.labels(e["reason"]).inc(),
            RebalanceFinished.name: self._rebalanced,
        }

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Count an event."""
        observe = self._observers.get(event["event"])
        if observe is not None:
            observe(event)

    def _stages(self, event: Mapping[str, Any]) -> None:
        for stage in STAGES:
            if stage.event.name == event["event"]:
                self._stage_seconds.labels(stage.name).observe(event[stage.duration] / 1e3)

    def _stall(self, cause: str, ms: float) -> None:
        self._stall_seconds.labels(cause).observe(ms / 1e3)

    def _update(self, outcome: str, ms: float) -> None:
        self._update_seconds.labels(outcome).observe(ms / 1e3)

    def _transferred(self, event: Mapping[str, Any]) -> None:
        self._stages(event)
        for key, labels in LINK_NBYTES.items():
            self._bytes.labels(*labels).inc(event[key])

    def _commit(self, event: Mapping[str, Any]) -> None:
        self._stages(event)
        self._committed.inc(event["nbytes"])
        if event["step"]:
            self._stall(COMMIT.name, event["copy_ms"])

    def _failed(self, event: Mapping[str, Any]) -> None:
        self._update("failed", event["duration_ms"])
        self._faults.labels(event["error"]).inc()

    def _rebalanced(self, event: Mapping[str, Any]) -> None:
        for when in ("before", "after"):
            self._balancedness.labels(when).set(event[f"balancedness_{when}"])
