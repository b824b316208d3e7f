"""Totals of updates on one rank: times of the stages, and bytes by direction, node and source."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from async_eplb.events.passes import PassTotals
from async_eplb.events.schema import LINK_NBYTES, LayerTransferred
from async_eplb.plan import SlotSource


@dataclass(slots=True)
class Tally:
    """Totals of an update. Times are in milliseconds, of all layers together."""

    plan_ms: float = 0.0
    transfer_ms: float = 0.0
    wait_ms: float = 0.0
    commit_ms: float = 0.0
    sent_nbytes_within_node: int = 0
    sent_nbytes_across_nodes: int = 0
    received_nbytes_within_node: int = 0
    received_nbytes_across_nodes: int = 0
    nbytes_by_source: Counter[SlotSource] = field(default_factory=Counter)

    def overlap(self, duration_ms: float) -> float:
        """Return the time of the stages over the duration; 0 if there was no time."""
        return (self.plan_ms + self.transfer_ms + self.commit_ms) / duration_ms if duration_ms else 0.0

    def numbers(self) -> dict[str, Any]:
        """Return all totals by name."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "nbytes_by_source"}

    def add_transfer(self, event: LayerTransferred) -> None:
        """Add what a layer's transfer moved."""
        self.transfer_ms += event.duration_ms
        for name in LINK_NBYTES:
            setattr(self, name, getattr(self, name) + getattr(event, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSummary:
    """What an update did, seen from one rank. Times are in milliseconds, of all layers together.

    :param overlap: time of the stages over the duration: 1 if one ran after another, 3 if all ran all the time
    :param nbytes_by_source: bytes written to live weights, by where they came from
    """

    generation: int
    layers: tuple[int, ...]
    num_unchanged_layers: int
    duration_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    overlap: float
    nbytes_by_source: dict[SlotSource, int]
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdaterStatistics:
    """What an updater has done since it was made.

    :param generation: updates begun
    :param updating: whether one is running
    :param step: boundaries passed
    :param lead: boundaries from the last one passed to a new fence
    :param num_rounds: control rounds held
    :param num_fence_waits: steps that had to wait for a round
    :param fence_wait_ms: how long they waited together
    :param longest_step_ms: longest time inside ``step()`` so far, waits included
    :param passes_beside_updates: forward passes, each from the end of a step to the end of the next, with an update
        under way at their beginning or end: ``num``, ``mean_ms``, ``longest_ms``; pauses are not counted
    :param other_passes: all others
    :param num_events_lost: events that the logger, or one of its observers, raised at
    """

    generation: int
    updating: bool
    num_updates_finished: int
    num_updates_failed: int
    num_layers_committed: int
    step: int
    lead: int
    num_rounds: int
    num_fence_waits: int
    fence_wait_ms: float
    longest_step_ms: float
    passes_beside_updates: PassTotals
    other_passes: PassTotals
    num_events_lost: int


@dataclass(slots=True)
class Totals:
    """Updates that have ended."""

    num_finished: int = 0
    num_failed: int = 0

    def add(self, *, failed: bool) -> None:
        """Count one more update."""
        self.num_failed += failed
        self.num_finished += not failed
