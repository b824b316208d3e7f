"""Records that a report is made of; ``--json`` prints all of them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import LINK_NBYTES
from async_eplb.events.stages import STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer of one update, on the rank with the longest total time.

    :param total_ms: sum of the stages on that rank
    :param nbytes: written to live weights on all ranks
    """

    generation: int
    layer: int
    rank: int
    total_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """All bytes from one rank to another.

    :param nbytes_per_s: bytes that the receiver got from all ranks over its transfer time, in layers with this link: a
        slow link slows all others of its transfer
    """

    src_rank: int
    dst_rank: int
    within_node: bool
    nbytes: int
    nbytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Lag of one rank behind the others.

    :param lag_ms: time from the median of all ranks to this one in staging a layer, mean over layers
    :param num_last: layers that it was the last to have staged
    """

    rank: int
    lag_ms: float
    num_last: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One update, all ranks together. Stage times are of the slowest rank, bytes of all ranks.

    :param outcome: ``finished``, ``failed``, or ``unfinished`` if the log has no end
    :param start_s: on the run's time line
    :param skipped_layers: layers that did not change, if the log has all others; else empty
    :param overlap: plan, transfer and commit time over the duration, mean of ranks
    :param stall_p50_ms: host time of commits and of waits at fences, summed by step; median over steps that had any
    :param pass_beside_p50_ms: time of a forward pass beside the update, all ranks together, as the next two; NaN if the
        log has none
    :param pass_p50_ms: the same of all passes of the run that are beside no update
    :param balancedness_before: measured by the rebalance; NaN if there was none
    :param break_even_steps: steps after which the update has saved as much time as it took; NaN if unknown
    """

    run_id: str
    generation: int
    mode: str
    outcome: str
    error: str
    start_s: float
    num_ranks: int
    num_ranks_logged: int
    num_nodes: int
    num_layers: int
    num_unchanged_layers: int
    skipped_layers: tuple[int, ...]
    duration_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    overlap: float
    copied_nbytes: int
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int
    committed_nbytes: int
    num_stalls: int
    stall_p50_ms: float
    stall_p99_ms: float
    stall_max_ms: float
    num_fence_waits: int
    fence_wait_ms: float
    num_passes_beside: int
    pass_beside_p50_ms: float
    pass_beside_p99_ms: float
    pass_beside_max_ms: float
    pass_p50_ms: float
    pass_p99_ms: float
    balancedness_before: float
    balancedness_after: float
    saved_ms_per_step: float
    break_even_steps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceReport:
    """One decision, as its lowest rank logged it.

    :param time_s: on the run's time line
    """

    run_id: str
    time_s: float
    pays: bool
    reason: str
    balancedness_before: float
    balancedness_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that is known from a log.

    :param slowest_layers: slowest first
    :param slowest_links: slowest first; of those that moved at least a hundredth of the mean link's bytes
    :param lagging_ranks: largest lag first
    :param faults: failed updates, dropped lines and faults of clocks, in words
    :param left_out: lines of the log that are not part of the report, in words
    :param clock_error_ms: bound on the error of times between hosts; 0 if there is one host
    """

    updates: tuple[UpdateReport, ...]
    rebalances: tuple[RebalanceReport, ...]
    slowest_layers: tuple[LayerReport, ...]
    slowest_links: tuple[LinkReport, ...]
    lagging_ranks: tuple[RankReport, ...]
    faults: tuple[str, ...]
    left_out: tuple[str, ...]
    clock_error_ms: float

    def figures(self) -> dict[str, float]:
        """Return the figures by which runs are compared: name → value; NaN if a log does not have it.

        Times and bytes are means over updates; ``*_max_*``, the stalls and the passes are of the worst one.
        """
        updates = self.updates
        figures: dict[str, float] = {
            "num_updates": len(updates),
            "num_failed": sum(update.outcome == "failed" for update in updates),
            "num_unfinished": sum(update.outcome == "unfinished" for update in updates),
            "num_faults": len(self.faults),
        }
        for name in _MEANS:
            figures[name] = _mean([getattr(update, name) for update in updates])
        figures["duration_max_ms"] = _max([update.duration_ms for update in updates])
        for name in _WORST:
            figures[name] = _max([getattr(update, name) for update in updates])
        figures["num_fence_waits"] = sum(update.num_fence_waits for update in updates)
        figures["lag_max_ms"] = _max([rank.lag_ms for rank in self.lagging_ranks])
        return figures

    def to_json(self) -> dict[str, Any]:
        """Return all records as values of JSON; NaN becomes null."""
        document: dict[str, Any] = _plain({**asdict(self), "figures": self.figures()})
        return document


_MEANS = (
    "duration_ms",
    *(stage.total for stage in STAGES),
    "overlap",
    *(name for name, (direction, _) in LINK_NBYTES.items() if direction == "sent"),
    "committed_nbytes",
    "fence_wait_ms",
    "balancedness_before",
    "balancedness_after",
    "break_even_steps",
)
_WORST = (
    "stall_p50_ms",
    "stall_p99_ms",
    "stall_max_ms",
    "pass_beside_p50_ms",
    "pass_beside_p99_ms",
    "pass_beside_max_ms",
    "pass_p50_ms",
    "pass_p99_ms",
)


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Bytes between ranks.

    :param nbytes: int64 ``[source ranks, destination ranks]``
    """

    nbytes: NDArray[np.int64]
    num_nodes: int


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _max(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON's values
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
