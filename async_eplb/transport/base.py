"""The contract between the updater and whatever moves bytes between ranks.

Who may touch what, and when:

- A send reads live weights in place. They must not change from :meth:`Transport.launch` until the layer is staged
  on every rank; the agreement sees to that.
- A receive writes staging in place. Nobody else touches it from launch until :meth:`PendingExchange.wait` returns.
- One-sided peers (:attr:`Transport.one_sided_peers`) post no messages to each other: a receiver pulls what it needs
  from the other's live weights, which it may only when that one has granted the layer (:attr:`Transport.launch_rule`).
  It waits for nobody, unless they pull in turn (:attr:`Pulls.in_turn`).
- Messages match by peer, row, hop and tag, so both sides must describe them alike; sizes must be equal.
- The second hop of a row and the first of the next may be under way at once, and neither waits for the other. The next
  row's first hop may be launched, and started, while one is under way; it may wait for that.
- A launched exchange is finished or its transport is broken: there is no way to take part of it back.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenControlGroup
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


class Message(NamedTuple):
    """Bytes to or from one peer.

    :param peer: rank in the EP group
    :param tag: equal on both sides, unique among a pair's messages of one exchange
    :param data: contiguous uint8 ``[bytes]``: live weights of a sender, staging of a receiver
    """

    peer: int
    tag: int
    data: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class MessageGroup:
    """Messages that are posted together, in this order; the same group number matches on every rank.

    What a group receives is in place before the sends of the next one are read.
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
    """All that a rank pulls for one layer, in any order.

    :param memory: what is written
    :param in_turn: whether each source is read by one rank after another, which uses links best. Ranks then wait for
        each other, as in a collective: only for what all ranks launch, in the same order, even if they pull nothing,
        while none serves and none's event loop waits for its device
    """

    slots: tuple[Pull, ...]
    memory: SlotMemory
    in_turn: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """All that one rank exchanges for one layer, or for one hop of it.

    :param row: row of the placement
    :param groups: posted one after another
    :param hop: 1 for what passes on, inside nodes, what hop 0 of the row brings; launched behind that on every rank
    :param pulls: from one-sided peers
    """

    row: int
    groups: tuple[MessageGroup, ...]
    hop: int = 0
    pulls: Pulls | None = None

    def parts(self) -> "tuple[Exchange, ...]":
        """Cut the exchange into what is launched at one boundary: one group, on every rank the same; pulls at once."""
        others = (replace(self, groups=(group,), pulls=None) for group in self.groups[1:])
        return replace(self, groups=self.groups[:1]), *others


class PendingExchange(Protocol):
    """A launched exchange."""

    async def start(self) -> None:
        """Do what the launch has left undone because it would hold up its thread; else :meth:`wait` does it first.

        Exchanges of earlier rows may be under way. Called once; what was started is waited for.

        :raises BrokenTransport: if the transport fails
        """
        ...

    async def wait(self, timeout_s: float) -> None:
        """Return when all receives are in staging and all sends have left live weights.

        :raises TransferTimeout: if that takes longer; the transport is then broken
        :raises BrokenTransport: if the transport fails or is aborted
        """
        ...


class Voter(Protocol):
    """One rank's voice in control rounds. Called from the thread that holds them, which it never blocks."""

    def pause_s(self) -> float:
        """Return how long this rank may put off its next round, in seconds; 0 to join it now."""
        ...

    def ballot(self) -> Sequence[int]:
        """Return 64-bit integers for the round that is now joined."""
        ...

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        """Take in what all ranks gave, in rank order; return whether another round follows."""
        ...

    def lose(self, error: BrokenControlGroup) -> None:
        """Take in that a rank did not answer. No round follows."""
        ...


class ControlGroup(Protocol):
    """Rounds of small messages between all ranks of an EP group, apart from the data."""

    async def run(self, voter: Voter) -> None:
        """Hold rounds until the voter says that none follows, or a rank does not answer.

        The voter is called without the help of the event loop, which may be blocked in a forward pass that waits
        for a peer.
        """
        ...

    def wake(self) -> None:
        """End the voter's pause, from any thread."""
        ...


class Transport(Protocol):
    """Moves the bytes of one updater; it is opened once and never reused after a failure."""

    @property
    def launch_rule(self) -> LaunchRule:
        """When a layer's exchange may be launched; known once the transport is open."""
        ...

    @property
    def needs_ordered_launch(self) -> bool:
        """Whether launches must have the same order as the model's own collectives on every rank."""
        ...

    @property
    def one_sided_peers(self) -> Collection[int]:
        """Peers that read this rank's live weights themselves, as it reads theirs; known once the transport is open."""
        ...

    @property
    def rank(self) -> int:
        """This process in the EP group."""
        ...

    @property
    def num_ranks(self) -> int:
        """Processes of the EP group."""
        ...

    @property
    def run_id(self) -> str:
        """Names the life of this transport in logs; equal on all ranks, and in no other run."""
        ...

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        relay_peers: Collection[int] = (),
    ) -> ControlGroup:
        """Connect to all ranks, which must all be opening; return a control group for this transport's owner.

        :param weights: live weights of this rank, all that will ever be moved
        :param relay_peers: the other ranks of this node, if second hops are to be launched; without them, first hops
            of later rows may wait for these
        :raises BusyTransport: if it is open already
        """
        ...

    def prepare(self, exchange: Exchange) -> None:
        """Do what a launch need not, such as to allocate: on any thread, with the stream of the launch current."""
        ...

    def launch(self, exchange: Exchange) -> PendingExchange:
        """Post an exchange without waiting for any peer.

        Where :attr:`needs_ordered_launch`, the work goes behind the current stream of the calling thread.

        :raises BrokenTransport: if the transport is not open
        """
        ...

    def abort(self) -> None:
        """Break the transport: exchanges under way end with an error, here and at the peers they are with."""
        ...

    async def aclose(self) -> None:
        """Close all connections. Nothing may be under way."""
        ...
