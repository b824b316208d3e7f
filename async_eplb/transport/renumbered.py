"""A transport between some ranks of an EP group, whose peers are named by their ranks in the whole group."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import TypeVar

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import BrokenControlGroup, BrokenTransport
from async_eplb.groups import Board
from async_eplb.transport.base import (
    OPEN_TIMEOUT_S,
    ControlGroup,
    PendingExchange,
    PreparedExchange,
    Transport,
    Voter,
)
from async_eplb.transport.exchange import Exchange, Message, MessageGroup, Pull
from async_eplb.transport.identity import Identity
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

E = TypeVar("E", BrokenControlGroup, BrokenTransport)
M = TypeVar("M", Message, Pull)


class RenumberedTransport:
    """Translates the ranks of the EP group into places in a transport's own group.

    :param transport: of the remaining ranks
    :param members: their ranks in the EP group, by their place in the transport's
    :param num_ranks: of the EP group
    """

    def __init__(self, transport: Transport, members: Sequence[int], num_ranks: int) -> None:
        self._transport = transport
        self._members = tuple(members)
        self._place = {rank: place for place, rank in enumerate(members)}
        self._num_ranks = num_ranks

    def __repr__(self) -> str:
        return f"<RenumberedTransport of ranks {list(self._members)}: {self._transport!r}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """The transport's."""
        return self._transport.launch_rule

    @property
    def one_sided_peers(self) -> frozenset[int]:
        """The transport's, by their ranks in the EP group."""
        return frozenset(self._members[place] for place in self._transport.one_sided_peers)

    @property
    def rank(self) -> int:
        """This process in the EP group."""
        return self._members[self._transport.rank]

    @property
    def num_ranks(self) -> int:
        """Ranks of the EP group, with those that are gone."""
        return self._num_ranks

    @property
    def run_id(self) -> str:
        """The transport's."""
        return self._transport.run_id

    @property
    def board(self) -> Board:
        """The transport's, by places."""
        return self._transport.board

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
        """Open the transport; peers that are gone relay nothing."""
        places = [self._place[peer] for peer in relay_peers if peer in self._place]
        control = await self._transport.open(
            device,
            workers,
            weights,
            control_timeout_s=control_timeout_s,
            open_timeout_s=open_timeout_s,
            identity=identity,
            relay_peers=places,
        )
        return RenumberedControlGroup(control, self._members)

    async def rebind(self, weights: ExpertWeights) -> None:
        """Replace the transport's weights."""
        with _renumbered(self._members):
            await self._transport.rebind(weights)

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange between places."""
        groups = tuple(
            MessageGroup(self._to_places(group.sends), self._to_places(group.recvs)) for group in exchange.groups
        )
        pulls = exchange.pulls and replace(exchange.pulls, slots=self._to_places(exchange.pulls.slots))
        with _renumbered(self._members):
            prepared = self._transport.prepare(replace(exchange, groups=groups, pulls=pulls))
        return _RenumberedPrepared(prepared, self._members)

    def replacement(self, number: int) -> "RenumberedTransport":
        """Return the transport's replacement, between the same ranks."""
        return RenumberedTransport(self._transport.replacement(number), self._members, self._num_ranks)

    def abort(self) -> None:
        """Abort the transport."""
        self._transport.abort()

    async def aclose(self) -> None:
        """Close the transport."""
        await self._transport.aclose()

    def _to_places(self, entries: Sequence[M]) -> tuple[M, ...]:
        return tuple(entry._replace(peer=self._place[entry.peer]) for entry in entries)


class RenumberedControlGroup:
    """Control rounds of some ranks of an EP group, whose errors name ranks of the whole group.

    :param control: of the remaining ranks
    :param members: their ranks in the EP group
    """

    def __init__(self, control: ControlGroup, members: Sequence[int]) -> None:
        self._control = control
        self._members = tuple(members)

    async def run(self, voter: Voter) -> None:
        """Run rounds."""
        await self._control.run(_RenumberedVoter(voter, self._members))

    def wake(self) -> None:
        """End the voter's pause."""
        self._control.wake()


class _RenumberedVoter:
    def __init__(self, voter: Voter, members: tuple[int, ...]) -> None:
        self.pause_s = voter.pause_s
        self.ballot = voter.ballot
        self.receive = voter.receive
        self._voter = voter
        self._members = members

    def lose(self, error: BrokenControlGroup) -> None:
        error = _named(error, self._members)
        self._voter.lose(error)


class _RenumberedPrepared:
    def __init__(self, prepared: PreparedExchange, members: tuple[int, ...]) -> None:
        self._prepared = prepared
        self._members = members

    def launch(self) -> PendingExchange:
        with _renumbered(self._members):
            return _RenumberedPending(self._prepared.launch(), self._members)


class _RenumberedPending:
    def __init__(self, pending: PendingExchange, members: tuple[int, ...]) -> None:
        self._pending = pending
        self._members = members

    async def start(self) -> None:
        with _renumbered(self._members):
            await self._pending.start()

    async def wait(self, timeout_s: float) -> None:
        with _renumbered(self._members):
            await self._pending.wait(timeout_s)


@contextmanager
def _renumbered(members: tuple[int, ...]) -> Iterator[None]:
    """Translate errors of the body from places to ranks of the EP group."""
    try:
        yield
    except BrokenTransport as error:
        raise _named(error, members) from error


def _named(error: E, members: tuple[int, ...]) -> E:
    """Return the error with ranks of the EP group in its facts; its message keeps places, and says of which ranks."""
    named = copy(error)
    named.__cause__ = error
    named.args = (f"{error} (counted among ranks {list(members)})",)
    facts = vars(named)
    if "rank" in facts:
        facts["rank"] = members[facts["rank"]]
    if "missing" in facts:
        facts["missing"] = tuple(members[place] for place in facts["missing"])
    return named
