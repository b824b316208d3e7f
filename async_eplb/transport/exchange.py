"""Values that describe what a rank exchanges with its peers: messages, pulls, and the exchange of them all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Message(NamedTuple):
    """Bytes to or from one peer.

    :param peer: rank in the EP group
    :param tag: number that matches both sides: equal on both sides, unique among a pair's messages of one exchange
    :param data: contiguous uint8 ``[bytes]``: live weights of a sender, staging of a receiver
    """

    peer: int
    tag: int
    data: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class MessageGroup:
    """Messages that are posted together, in this order; a rank's n-th group matches the n-th of every other rank.

    All that a group receives is in place before the sends of the next one are read.
    """

    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]


class SlotMemory(Protocol):
    """Where pulled slots are written."""

    @property
    def slot_nbytes(self) -> Sequence[int]:
        """Bytes of a slot in each tensor of the row."""
        ...

    def addresses(self, slots: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return where slots are: int64 ``[slots, tensors]``."""
        ...

    def views(self, slot: int) -> tuple[Tensor, ...]:
        """Return a slot: uint8 ``[bytes]`` for each tensor of the row."""
        ...


class Pull(NamedTuple):
    """A slot of a one-sided peer, read from its live weights.

    :param peer: rank in the EP group
    :param src_slot: of the peer
    :param dst_slot: of the memory that is written
    """

    peer: int
    src_slot: int
    dst_slot: int


@dataclass(frozen=True, slots=True, eq=False)
class Pulls:
    """All slots that a rank pulls for one layer, in any order.

    :param memory: where the slots are written
    :param in_turn: whether each source is read by one rank after another, which uses links best. Ranks then wait for
        each other, as in a collective. So every rank must launch the exchange, in the same order, even if it pulls
        nothing; no rank may serve meanwhile, and no event loop may wait for its device
    """

    slots: tuple[Pull, ...]
    memory: SlotMemory
    in_turn: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """All that one rank exchanges for one layer, or for one hop of it.

    :param row: row of the placement
    :param groups: posted one after another
    :param hop: 0 for the transfer itself; 1 for relays inside nodes, which send on the slots that hop 0 of the row
        brought, and are launched behind it on every rank
    :param pulls: slots of one-sided peers
    """

    row: int
    groups: tuple[MessageGroup, ...]
    hop: int = 0
    pulls: Pulls | None = None

    @property
    def has_messages(self) -> bool:
        """Whether anything is sent or received, apart from what is pulled."""
        return any(group.sends or group.recvs for group in self.groups)

    def parts(self) -> "tuple[Exchange, ...]":
        """Return the parts that are launched at a boundary each: a group, on all ranks the same; pulls in the first."""
        others = (replace(self, groups=(group,), pulls=None) for group in self.groups[1:])
        return replace(self, groups=self.groups[:1]), *others
