"""The contract between the updater and the transports that move bytes between ranks.

An exchange is prepared (:meth:`Transport.prepare`), launched (:meth:`PreparedExchange.launch`), and waited for
(:meth:`PendingExchange.wait`). Who may touch what, and when:

- A send reads live weights in place. They must not change from :meth:`PreparedExchange.launch` until the layer is
  staged on every rank; the agreement sees to that.
- A receive writes staging in place. Nobody else touches it from launch until :meth:`PendingExchange.wait` returns.
- One-sided peers (:attr:`Transport.one_sided_peers`) post no messages to each other: a receiver pulls the slots that it
  needs from the other's live weights, once that rank has granted the layer (:attr:`Transport.launch_rule`). It waits
  for nobody, unless they pull in turn (:attr:`Pulls.in_turn`).
- Messages match by peer, row, hop and tag, so both sides must describe them alike; sizes must be equal.
- The second hop of a row and the first of the next may be under way at once, and neither waits for the other. The next
  row's first hop may be launched, and started, while one is under way; it may wait for that.
- Exchanges are launched in the same order on all ranks. They may be prepared in any order, and one that is never
  launched costs its memory only.
- A launched exchange is finished or its transport is broken: there is no way to take part of it back.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenControlGroup
from async_eplb.groups import Board
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.identity import Identity
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

OPEN_TIMEOUT_S = 300.0
"""How long opening waits for all ranks, unless it is told otherwise."""


class PendingExchange(Protocol):
    """A launched exchange."""

    async def start(self) -> None:
        """Do the work that the launch left undone because it would delay its thread; else :meth:`wait` does it first.

        Exchanges of earlier rows may be under way. Called once; a started exchange must be waited for.

        :raises BrokenTransport: if the transport fails
        """
        ...

    async def wait(self, timeout_s: float) -> None:
        """Return when all receives are in staging and all sends have left live weights.

        :raises TransferTimeout: if that takes longer; the transport is then broken
        :raises BrokenTransport: if the transport fails or is aborted
        """
        ...


class PreparedExchange(Protocol):
    """An exchange that can be launched without delay."""

    def launch(self) -> PendingExchange:
        """Post the exchange without waiting for any peer. Called once at most.

        Where :attr:`Transport.launch_rule` needs order, the work goes behind the current stream of the calling thread.

        :raises BrokenTransport: if the transport fails, or was aborted or closed since the preparation
        """
        ...


class Voter(Protocol):
    """One rank's voice in control rounds. It is called from the thread that runs them, which it never blocks."""

    def pause_s(self) -> float:
        """Return how long this rank may put off its next round, in seconds; 0 to join it now."""
        ...

    def ballot(self) -> Sequence[int]:
        """Return 64-bit integers for the round that is now joined."""
        ...

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        """Process the ballots of all ranks, in rank order; return whether another round follows."""
        ...

    def lose(self, error: BrokenControlGroup) -> None:
        """Process the loss of a rank that did not answer. No round follows."""
        ...


class ControlGroup(Protocol):
    """Rounds of small messages between all ranks of an EP group, apart from the data."""

    async def run(self, voter: Voter) -> None:
        """Run rounds until the voter asks for no other, or a rank does not answer.

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
        """When an exchange may be launched; known once the transport is open."""
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
        """Name of the life of this transport in logs; equal on all ranks, and in no other run."""
        ...

    @property
    def board(self) -> Board:
        """Where its ranks leave texts for each other, before it is opened and after."""
        ...

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        identity: Identity | None = None,
        relay_peers: Collection[int] = (),
    ) -> ControlGroup:
        """Connect to all ranks, which must all be opening; return a control group for this transport's owner.

        :param weights: live weights of this rank: all that is moved, until :meth:`rebind` brings others
        :param control_timeout_s: how long a control round waits for the slowest rank
        :param open_timeout_s: how long this waits for all ranks
        :param identity: what it is opened for, if that must be the same on all ranks
        :param relay_peers: the other ranks of this node, if second hops are to be launched; without them, first hops
            of later rows may wait for these
        :raises BusyTransport: if it is open already
        :raises OpenTimeout: if a rank does not come in time
        :raises UpdaterMismatch: if ranks open it for different updaters, on every rank
        :raises BusyGroup: if such an updater is open on the group already, on every rank
        """
        ...

    async def rebind(self, weights: ExpertWeights) -> None:
        """Take other live weights in place of those that :meth:`open` was given; all ranks call this together.

        Nothing is under way. The weights before may be freed when this has returned, on all ranks.

        :raises BrokenTransport: if the transport is not open
        :raises EplbError: if it cannot, or a rank does not take part; the transport is then broken
        """
        ...

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Do all that can be done before the launch, and read and write nothing of the exchange; allocate nothing.

        Called on any thread, with the stream of the launch current. An exchange that is launched in parts
        (:meth:`Exchange.parts`) is prepared part by part.

        :raises BrokenTransport: if the transport is not open
        """
        ...

    def abort(self) -> None:
        """Break the transport: exchanges under way end with an error, here and at the peers they are with."""
        ...

    def replacement(self, number: int) -> "Transport":
        """Return an unused transport between the same ranks, for when this one has broken; all ranks ask for one.

        Control rounds of this one go on until it is closed.

        :param number: the same on all ranks, and another one each time
        """
        ...

    async def aclose(self) -> None:
        """Close all connections. Nothing may be under way."""
        ...
