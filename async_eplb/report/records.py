"""What a report says, as values; all of them go into ``--json`` as they are."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import LINK_NBYTES
from async_eplb.events.stages import STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer of one update, on the rank that was slowest to have it committed.

    :param total_ms: plan, transfer, wait and commit on that rank
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

    :param nbytes_per_s: what the receiver got from all ranks over its transfer time, in layers that came this way too:
        a slow link slows all of them
    """

    src_rank: int
    dst_rank: int
    within_node: bool
    nbytes: int
    nbytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """How far one rank was behind the others.

    :param lag_ms: mean over layers of when it had staged them, after the median of all ranks
    :param num_last: layers that it was the last to have staged
    """

    rank: int
    lag_ms: float
    num_last: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One update, all ranks together. Stage times are of the slowest rank, bytes of all ranks.

    :param outcome: ``finished``, ``failed``, or ``unfinished`` if the log does not say
    :param start_s: on the run's time line
    :param skipped_layers: layers that did not change, if the log has all others; else empty
    :param overlap: plan, transfer and commit time over the duration, mean of ranks
    :param stall_p50_ms: of the serving thread at steps with commits or waits at fences: their host time
    :param balancedness_before: as the rebalance measured it; NaN if none did
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
    """What a log says.

    :param slowest_layers: slowest first
    :param slowest_links: slowest first; of those that moved at least a hundredth of the mean link's bytes
    :param lagging_ranks: last first
    :param faults: updates that failed, dropped lines, and what is wrong with clocks, in words
    :param left_out: lines of the log that nothing here counts, in words
    :param clock_error_ms: what times of ranks of different hosts can be wrong by; 0 if there is one host
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
        """Return the numbers that runs are compared by. Those that a log does not hold are NaN.

        Times and bytes are means over updates; ``*_max_*`` and the stalls are of the worst one.
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
        """Return everything as JSON's own values; NaN is null."""
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
_WORST = ("stall_p50_ms", "stall_p99_ms", "stall_max_ms")


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
