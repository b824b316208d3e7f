"""One layer on its way: planned, and then in flight until its commit is done on the device."""

from dataclasses import dataclass, field

from async_eplb.commit.committer import PreparedCommit
from async_eplb.expert_map import LayerCommit, LayerMaps
from async_eplb.plan import LayerPlan, PostedLayer, SlotSource
from async_eplb.staging import StagingBuffer
from async_eplb.transport.base import PendingExchange, PreparedExchange

MOVING = frozenset({SlotSource.SAME_GPU, SlotSource.FREE_RIDER, SlotSource.SAME_NODE, SlotSource.CROSS_NODE})
"""Sources of slots whose live weights a commit writes."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """A layer with all that is known before its bytes move.

    :param maps: what is published when it is committed
    :param peak_nbytes: bytes that the busiest rank sends or receives, equal on all ranks
    """

    row: int
    posted: PostedLayer
    maps: LayerMaps
    peak_nbytes: int

    @property
    def plan(self) -> LayerPlan:
        """What this rank sends, receives and copies."""
        return self.posted.plan

    def committed(self, step: int) -> LayerCommit:
        """Return what the caller's hook is told, once the commit is enqueued."""
        return LayerCommit(self.row, step, self.maps)


@dataclass(slots=True, eq=False)
class Hop:
    """An exchange of a layer, and how far it is launched.

    :param parts: what is launched one after another, one at each boundary where launches are ordered
    :param pending: launched parts
    """

    parts: tuple[PreparedExchange, ...]
    pending: list[PendingExchange] = field(default_factory=list)

    @property
    def is_launched(self) -> bool:
        """Whether all parts are."""
        return len(self.pending) == len(self.parts)


@dataclass(slots=True, eq=False)
class LayerInFlight:
    """A layer that has a staging buffer, until its commit is done on the device.

    Times are in seconds on the event loop's clock.

    :param hops: what is exchanged, and then, where the planner relays, what is passed on
    :param commit: what is to be enqueued when the layer is staged on every rank
    :param turn_s: when its transfer's turn came
    :param staged_s: when it was staged
    :param copy_ms: host time of enqueuing the commit
    :param nbytes: bytes that the commit wrote to live weights
    :param step: boundary that it was committed at; 0 in the exclusive mode
    """

    planned: PlannedLayer
    buffer: StagingBuffer
    hops: tuple[Hop, ...]
    commit: PreparedCommit
    turn_s: float = 0.0
    staged_s: float = 0.0
    copy_ms: float = 0.0
    nbytes: int = 0
    step: int = 0
