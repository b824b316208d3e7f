"""Values that describe what one rank sends, receives and copies for one layer.

The small ones are named tuples: an update has thousands, and they are made for half of a dataclass's cost.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class SlotSource(Enum):
    """Where the new content of a slot comes from. If several apply, the first in this order is meant.

    A slot whose expert crosses nodes once and is passed on inside the node is SAME_NODE where it is passed on to.
    """

    EMPTY = "empty"
    UNCHANGED = "unchanged"
    SAME_GPU = "same_gpu"
    FREE_RIDER = "free_rider"
    SAME_NODE = "same_node"
    CROSS_NODE = "cross_node"


class LocalCopy(NamedTuple):
    """Copy live slot ``src_slot`` into the staging of ``dst_slot``, on one rank."""

    src_slot: int
    dst_slot: int


class Recv(NamedTuple):
    """Receive an expert from ``src_rank`` into the staging of ``dst_slot``."""

    logical_expert: int
    src_rank: int
    dst_slot: int


class Send(NamedTuple):
    """Send the live slot ``src_slot`` to ``dst_rank``."""

    logical_expert: int
    dst_rank: int
    src_slot: int


class FanOut(NamedTuple):
    """Commit the staging of ``staged_slot`` to ``dst_slot`` too."""

    staged_slot: int
    dst_slot: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The plan of one layer for one rank; the orders of its entries are part of the contract.

    :param slot_sources: one for each local slot
    :param local_copies: SAME_GPU slots, in slot order
    :param recvs: SAME_NODE and CROSS_NODE slots, in slot order
    :param sends: ascending expert, then same-node destinations, then cross-node ones, each in rank order
    :param fan_outs: FREE_RIDER slots, in slot order
    :param relays: what a relaying planner lets this rank pass on inside its node: sends from the *staging* of
        ``src_slot``, posted after that slot is received; in the order of ``sends``
    """

    slot_sources: tuple[SlotSource, ...]
    local_copies: tuple[LocalCopy, ...]
    recvs: tuple[Recv, ...]
    sends: tuple[Send, ...]
    fan_outs: tuple[FanOut, ...]
    relays: tuple[Send, ...] = ()

    @property
    def source_counts(self) -> dict[SlotSource, int]:
        """How many slots have each source."""
        return {source: self.slot_sources.count(source) for source in SlotSource}

    @property
    def staged_slots(self) -> tuple[int, ...]:
        """The slots that pass through staging, in ascending order."""
        received = [recv.dst_slot for recv in self.recvs]
        return tuple(sorted(received + [copy.dst_slot for copy in self.local_copies]))
