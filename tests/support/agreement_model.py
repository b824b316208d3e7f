"""Actions of ranks that run an agreement, for the search in ``agreement_search``.

What a rank does depends on itself and on what rounds told it, but for when it may: :meth:`Actions.of` says what it
can do, the search what the others let it do.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from operator import attrgetter

from async_eplb.agreement.agreed import Agreed, Counts
from async_eplb.agreement.ballot import Ballot, Decision, Status, Verdict
from async_eplb.agreement.boundaries import Boundaries
from async_eplb.agreement.lead import Lead
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import GenerationMismatch

FIRST_BOUNDARY = 100
"""The last boundary that all ranks have passed: boundaries are counted from it. Not 0, which means none."""
FORGOTTEN = FIRST_BOUNDARY - 1
"""Earlier boundaries are not distinguished."""


class Do(Enum):
    """The kinds of actions of a rank."""

    BEGIN = auto()
    END = auto()
    """Be done with an update that has failed, before the next one begins."""
    PLAN = auto()
    """With launches that need the others: get a plan and a buffer for the next layer."""
    TRANSFER = auto()
    """Begin the transfer of the next layer, unless an ordered launch does: when it is granted, or get all it needs."""
    STAGE = auto()
    """See the transfer end."""
    FINISH = auto()
    """See a commit's copies end on the device."""
    JOIN = auto()
    RECEIVE = auto()
    PASS = auto()
    STAND = auto()
    SETTLE = auto()
    """Do what is due while standing."""
    DRAIN = auto()
    """Do what is due at boundaries that this rank never comes to, when there are no more rounds."""
    GO_ON = auto()
    """Stop standing."""
    WAITED = auto()
    CANCEL = auto()
    FAIL = auto()
    GIVE_UP = auto()
    """Have the update end, because others have not begun it."""
    LEAVE = auto()
    QUIET = auto()
    """Traffic ends for good: all ranks go idle before the same boundary."""

    __hash__ = object.__hash__


DISTURBANCES = frozenset({Do.WAITED, Do.CANCEL, Do.FAIL, Do.GIVE_UP, Do.LEAVE, Do.QUIET})
"""Optional events, each of which happens only so often."""
COMMITTING = frozenset({Do.RECEIVE, Do.PASS, Do.SETTLE, Do.DRAIN})
"""Actions that can commit and launch layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """An explored world, and its bounds.

    :param leads: of each rank, so as many as there are ranks
    :param layers: of each update
    :param parts: that a layer is launched in, where launches are ordered
    :param window: staging buffers of each rank
    :param skew: steps that a rank can be ahead of the slowest
    :param one_sided: whether a transfer ends without its other side
    :param at_once: whether all ranks have begun when the search does
    :param standing: whether ranks stand and go on as traffic comes and goes
    :param eager: whether a rank joins a round only when it is eager to, as if pauses never ended by themselves
    :param budget: what of :data:`DISTURBANCES` may happen, each to any rank at any point, or never
    """

    leads: tuple[int, ...]
    layers: int
    parts: int = 1
    window: int = 1
    skew: int = 1
    mode: Mode = Mode.SERVING
    launch_rule: LaunchRule = LaunchRule.AT_ONCE
    one_sided: bool = False
    updates: int = 1
    at_once: bool = True
    standing: bool = False
    eager: bool = False
    budget: tuple[Do, ...] = ()
    agreement: type[Agreement] = Agreement

    @property
    def ordered_launch(self) -> bool:
        """Whether a decision begins transfers."""
        return self.launch_rule.needs_order

    @property
    def stands(self) -> bool:
        """Whether a rank is ever idle."""
        return self.standing or Do.QUIET in self.budget


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank. Its agreement is never changed, only copied. Layers are counted over all updates.

    :param mail: the ballot that it gave to the open round, or the ballots of the round that it is to receive
    :param before: layers committed by earlier updates
    :param transfers: layers whose transfer has begun
    :param launches: parts launched, of which a layer's transfer begins with the last
    :param commits: layers whose commit is enqueued
    :param history: ``(launches, commits)`` after each boundary from the one that all ranks have passed to the last
        that this one has
    :param left: whether a round showed that a rank leaves; no other follows
    :param gone: whether it was this one
    """

    agreement: Agreement
    mail: Ballot | tuple[Ballot, ...] | None = None
    before: int = 0
    transfers: int = 0
    launches: int = 0
    commits: int = 0
    history: tuple[tuple[int, int], ...] = ((0, 0),)
    left: bool = False
    gone: bool = False

    def __str__(self) -> str:
        mail = "" if self.mail is None else ", gave its ballot" if isinstance(self.mail, Ballot) else ", is to receive"
        return f"{self.agreement!r} {self.transfers} begun, {self.commits} enqueued{mail}"

    @property
    def staged(self) -> int:
        """Layers staged."""
        return self.before + self.agreement.update.staged

    @property
    def committed(self) -> int:
        """Layers whose commit has finished."""
        return self.before + self.agreement.update.finished

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do for the update that it has begun."""
        agreement = self.agreement
        over = agreement.update.over or self.gone or (self.left and not agreement.running)
        return over and not agreement.boundaries.decisions and self.committed == self.commits

    @property
    def has_failed(self) -> bool:
        """Whether the update has ended early."""
        agreement = self.agreement
        return agreement.running and self.ended and agreement.update.finished < agreement.update.limit

    @property
    def latest(self) -> int:
        """Number of the last update that this rank has begun, or has missed."""
        return max(self.agreement.generation, self.agreement.missed)

    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for equal ranks."""
        counts = (self.before, self.transfers, self.launches, self.commits)
        return (*_state(self.agreement), self.mail, *counts, self.history, self.left, self.gone)


_OWN = attrgetter("generation", "running", "status", "demanded", "demand_shown", "missed")
_PARTS = {
    "lead": attrgetter(*(each.name for each in fields(Lead))),
    "boundaries": attrgetter(*(each.name for each in fields(Boundaries))),
    "update": attrgetter(*(each.name for each in fields(Agreed))),
}


def _state(agreement: Agreement) -> tuple[object, ...]:
    """Return all that an agreement may change, as one flat tuple."""
    return (*_OWN(agreement), *(value for name, get in _PARTS.items() for value in get(getattr(agreement, name))))


def copied(agreement: Agreement) -> Agreement:
    """Return an agreement in the same state, that goes on by itself."""
    other = copy(agreement)
    for name, get in _PARTS.items():
        part = getattr(agreement, name)
        setattr(other, name, type(part)(*get(part)))
    return other


class Violation(AssertionError):
    """A state that must not be."""


class Actions:
    """The actions that a rank has in a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def start(self, lead: int) -> Rank:
        """Return a rank as it is when the search begins."""
        agreement = self.world.agreement(lead=lead, launch_rule=self.world.launch_rule)
        agreement.boundaries.step = FIRST_BOUNDARY
        return self._begin(Rank(agreement)) if self.world.at_once else Rank(agreement)

    def of(self, rank: Rank) -> Iterator[tuple[Do, Rank]]:
        """Yield each action and what becomes of the rank.

        :raises Violation: if an action has an outcome that must not be
        """
        agreement = rank.agreement
        if rank.committed < rank.commits:
            yield Do.FINISH, _with(rank, finished=agreement.update.finished + 1)
        if rank.gone:
            return
        if isinstance(rank.mail, tuple):
            yield Do.RECEIVE, self._receive(rank, rank.mail)
        elif rank.mail is None and not rank.left and (agreement.is_eager() or not self.world.eager):
            yield Do.JOIN, self._join(rank)
        yield from self._updating(rank)
        if agreement.update.begun and not agreement.update.over and agreement.status is not Status.FAILED:
            yield from self._staging(rank)
        if self.world.mode is Mode.SERVING:
            yield from self._serving(rank)
        for do in set(self.world.budget) - {Do.QUIET}:
            disturbed = self._disturbed(do, rank)
            if disturbed.key() != rank.key():
                yield do, disturbed

    def rebased(self, rank: Rank, steps: int) -> Rank:
        """Return the rank with boundaries counted from a later one."""
        if rank.gone:
            return rank
        agreement = copied(rank.agreement)
        agreement.boundaries.step -= steps
        agreement.boundaries.fence -= steps if agreement.boundaries.fence else 0
        agreement.boundaries.stood_before = (
            max(FORGOTTEN, agreement.boundaries.stood_before - steps) if self.world.stands else 0
        )
        agreement.boundaries.last = max(FORGOTTEN + 1, agreement.boundaries.last - steps)
        agreement.boundaries.decisions = tuple(
            replace(d, boundary=d.boundary - steps) for d in agreement.boundaries.decisions
        )
        mail = rank.mail
        if isinstance(mail, Ballot):
            mail = _rebased(mail, steps)
        elif mail:
            mail = tuple(_rebased(ballot, steps) for ballot in mail)
        return replace(rank, agreement=agreement, mail=mail, history=rank.history[steps:])

    def _begin(self, rank: Rank) -> Rank:
        world = self.world
        rank = self._end(rank) if rank.agreement.running else rank
        agreement = copied(rank.agreement)
        agreement.begin(world.mode, digest=1, total=world.layers, window=world.window)
        return replace(rank, agreement=agreement, before=rank.commits)

    def _end(self, rank: Rank) -> Rank:
        agreement = copied(rank.agreement)
        agreement.end(failed=rank.has_failed)
        transfers = rank.commits if rank.has_failed else rank.transfers
        return replace(rank, agreement=agreement, transfers=transfers)

    def _join(self, rank: Rank) -> Rank:
        agreement = copied(rank.agreement)
        ballot = agreement.ballot()
        return replace(rank, agreement=agreement, mail=ballot if ballot.standing else replace(ballot, step=0))

    def _receive(self, rank: Rank, ballots: tuple[Ballot, ...]) -> Rank:
        agreement = copied(rank.agreement)
        try:
            verdict = agreement.receive(ballots)
        except GenerationMismatch:
            if Do.GIVE_UP not in self.world.budget:
                raise
            agreement.update.over = True
            verdict = Verdict(over=True)
        agreement.update.seen = agreement.update.seen if self.world.eager else Counts()
        agreement.lead.calm = 0
        if not self.world.stands:
            agreement.boundaries.stood_before = 0
        if verdict.boundary and verdict.boundary <= agreement.boundaries.step:
            raise Violation(f"decided for a boundary that was passed: {verdict}")
        leaves = any(ballot.status is Status.LEAVING for ballot in ballots) and agreement.status is Status.LEAVING
        rank = replace(rank, agreement=agreement, mail=None, left=bool(verdict.gone), gone=leaves)
        if self.world.mode is Mode.EXCLUSIVE:
            return self._execute(rank, Decision(0, verdict.agreed, verdict.launched * self.world.parts))
        return self._execute(rank, agreement.boundaries.due_ever()) if leaves else rank

    def _updating(self, rank: Rank) -> Iterator[tuple[Do, Rank]]:
        may_begin = not rank.agreement.running or rank.ended
        if may_begin and not rank.left and rank.latest < self.world.updates:
            yield Do.BEGIN, self._begin(rank)
        if rank.has_failed and self.world.updates > 1:
            yield Do.END, self._end(rank)

    def _staging(self, rank: Rank) -> Iterator[tuple[Do, Rank]]:
        agreement, world = rank.agreement, self.world
        room = min(agreement.update.limit, world.layers, agreement.update.finished + world.window)
        if world.launch_rule is not LaunchRule.AT_ONCE and agreement.update.launchable < room:
            yield Do.PLAN, _with(rank, parts=(*agreement.update.parts, world.parts))
        if world.launch_rule is LaunchRule.GRANTED:
            room = min(room, agreement.update.launched)
        if not world.ordered_launch and rank.transfers == rank.staged < rank.before + room:
            yield Do.TRANSFER, replace(rank, transfers=rank.transfers + 1)
        if rank.staged < rank.transfers:
            yield Do.STAGE, _with(rank, staged=agreement.update.staged + 1)

    def _serving(self, rank: Rank) -> Iterator[tuple[Do, Rank]]:
        agreement = copied(rank.agreement)
        if agreement.boundaries.standing:
            yield Do.GO_ON, _with(rank, standing=False)
            decision = agreement.boundaries.due_next()
            if decision:
                yield Do.SETTLE, self._execute(replace(rank, agreement=agreement), decision)
            elif agreement.boundaries.decisions and rank.left:
                yield Do.DRAIN, self._execute(replace(rank, agreement=agreement), agreement.boundaries.due_ever())
            return
        if self.world.stands:
            yield Do.STAND, _with(rank, standing=True)
        if agreement.boundaries.may_pass():
            passed = self._execute(replace(rank, agreement=agreement), agreement.boundaries.pass_next())
            if passed.launches > rank.launches + 1 and not self.world.stands:
                raise Violation(f"{rank} is to launch {passed.launches - rank.launches} parts at one boundary")
            yield Do.PASS, replace(passed, history=(*rank.history, (passed.launches, passed.commits)))

    def _disturbed(self, do: Do, rank: Rank) -> Rank:
        agreement = copied(rank.agreement)
        if do is Do.CANCEL:
            agreement.cancel()
        elif do is Do.FAIL and agreement.running and not agreement.update.over:
            agreement.fail()
        elif do is Do.GIVE_UP and agreement.running and not (agreement.update.begun or agreement.update.over):
            agreement.give_up()
        elif do is Do.LEAVE:
            agreement.leave()
        elif do is Do.WAITED and not agreement.boundaries.may_pass():
            agreement.lead.waited()
        return replace(rank, agreement=agreement)

    def _execute(self, rank: Rank, decision: Decision | None) -> Rank:
        """Commit and launch what was decided."""
        if decision is None:
            return rank
        commits = rank.before + decision.copied
        if not rank.commits <= commits <= rank.staged:
            raise Violation(f"{rank} is to commit up to {commits}")
        if not self.world.ordered_launch:
            return replace(rank, commits=commits)
        parts = self.world.parts
        launches = rank.before * parts + decision.parts_launched
        if not rank.launches <= launches <= (rank.before + rank.agreement.update.launchable) * parts:
            raise Violation(f"{rank} is to launch up to {launches}")
        return replace(rank, commits=commits, launches=launches, transfers=launches // parts)


def _with(rank: Rank, **values: int | tuple[int, ...]) -> Rank:
    agreement = copied(rank.agreement)
    for name, value in values.items():
        setattr(agreement.boundaries if name == "standing" else agreement.update, name, value)
    return replace(rank, agreement=agreement)


def _rebased(ballot: Ballot, steps: int) -> Ballot:
    fence = ballot.fence - steps if ballot.fence else 0
    return replace(ballot, fence=fence, step=max(FORGOTTEN, ballot.step - steps) if ballot.standing else 0)
