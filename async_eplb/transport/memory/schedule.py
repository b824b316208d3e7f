"""Delays and faults of a world in memory, seeded."""

from dataclasses import dataclass
from enum import Enum

from async_eplb.agreement.rules import LaunchRule


class FaultKind(Enum):
    """A fault of a message."""

    DROP = "drop"
    CORRUPT = "corrupt"
    DUPLICATE = "duplicate"
    """It is read from the sender and written to the receiver twice, before the exchange is over."""
    DELAY = "delay"


@dataclass(frozen=True, slots=True)
class Fault:
    """Every message from ``src_rank`` to ``dst_rank`` for ``row`` meets this fault.

    :param tag: only the message with this tag; all without it. A tensor of a pulled slot has the tag
        ``dst_slot * tensors + tensor``
    :param delay_s: how late a delayed or duplicated message comes, in seconds
    """

    kind: FaultKind
    src_rank: int
    dst_rank: int
    row: int
    tag: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MemorySchedule:
    """Delays and faults of a world; equal schedules give equal runs.

    :param seed: of all random delays
    :param exchange_s: seconds that an exchange takes at least
    :param relay_s: the same of a second hop
    :param message_jitter_s: each message takes up to this many seconds more, at random
    :param reorder: messages of an exchange arrive in an order of their own, not in that in which they were posted
    :param control_s: seconds that a control round takes
    :param control_jitter_s: each rank has a round's result up to this many seconds later, at random
    :param lost_results: (rank, number of the round from 0): that rank does not get the result of the round
    :param launch_rule: of the transports; granted ones are one-sided: receivers read peers' live weights themselves
    :param faults: of messages
    """

    seed: int = 0
    exchange_s: float = 0.0
    relay_s: float = 0.0
    message_jitter_s: float = 0.0
    reorder: bool = False
    control_s: float = 0.0
    control_jitter_s: float = 0.0
    lost_results: frozenset[tuple[int, int]] = frozenset()
    launch_rule: LaunchRule = LaunchRule.AT_ONCE
    faults: tuple[Fault, ...] = ()
