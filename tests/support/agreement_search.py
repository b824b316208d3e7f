"""A breadth-first search over every interleaving of what ranks that run an agreement can do.

A state is one :class:`Rank` for each rank; an action changes one of them. A round completes when the last rank has
joined it, reaches each rank on its own, and a rank joins the next when it has received the last.

What is checked in every state: no decision is for a boundary that was passed; layers are committed in order and only
when they are staged everywhere; granted ones are read only when every rank has granted them; ranks that have passed the
same boundary had, when they did, launched the same parts and committed the same layers; a boundary launches one part,
unless ranks stood before it; nobody takes the update to be over before all layers are committed on all devices. At the
end, all have committed the same layers, and nothing else was begun. From every state the end can be reached, and
boundaries without a fence by rounds alone. In a finite graph, that the end can be reached from everywhere means that it
is reached if nothing that can happen again and again is put off for ever; what need not happen (a disturbance, a rank
that stands while there is traffic) is not used on the way. A rank stands only when the others have passed as many
boundaries as it has, for its last forward pass has ended; others may have gone on by then.

What keeps the number of states finite:

- Boundaries are counted from the last that all ranks have passed, and none gets further ahead than ``skew``. Only
  differences matter to the agreement, so any number of steps is covered.
- States that differ by the order of ranks are one: ranks are told apart in error messages only.
- Attributes that no rule reads again are cleared: the minima of the last round, the count of calm decisions, steps in
  ballots unless all ranks of the round stand, and where long passed boundaries were.
"""

import gc
from collections import Counter
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from time import perf_counter
from typing import NamedTuple

import numpy as np

from async_eplb.agreement.ballot import Ballot, Status
from async_eplb.agreement.rules import LaunchRule
from async_eplb.errors import EplbError
from support.agreement_model import COMMITTING, DISTURBANCES, FIRST_BOUNDARY, Actions, Do, Rank, Violation, World

HINDERED = DISTURBANCES | {Do.STAGE, Do.PASS, Do.STAND, Do.GO_ON, Do.DRAIN}
"""Actions that other ranks can prevent."""
_row = attrgetter(*(each.name for each in fields(Ballot)))
MAX_STATES = 2_000_000
"""A search that finds more has lost its bounds."""


@dataclass(frozen=True, slots=True)
class Explored:
    """How much was explored."""

    states: int
    transitions: int
    ends: int
    seconds: float


def explore(world: World) -> Explored:
    """Explore all states of a world.

    :raises Violation: with one of the shortest ways to a state that must not be
    """
    gc.disable()  # nothing that a search makes is garbage before its end, and to look through it takes a sixth of it
    try:
        return _Search(world).run()
    finally:
        gc.enable()


class _State(NamedTuple):
    """Disturbances that may still come, whether traffic has ended, and the numbers of the ranks, in order."""

    budget: tuple[Do, ...]
    quiet: bool
    ranks: tuple[int, ...]


class _Table:
    """Every different rank has a number here, and what depends on it alone is worked out once."""

    def __init__(self, actions: Actions) -> None:
        self.ranks: list[Rank] = []
        self.free: set[int] = set()
        self.ended: set[int] = set()
        self._actions = actions
        self._numbers: dict[tuple[object, ...], int] = {}
        self._moves: dict[int, tuple[tuple[Do, int], ...]] = {}
        self._rebased: dict[tuple[int, int], int] = {}
        self._delivered: dict[tuple[int, tuple[Ballot, ...]], int] = {}

    def number(self, rank: Rank) -> int:
        number = self._numbers.setdefault(rank.key(), len(self.ranks))
        if number == len(self.ranks):
            self.ranks.append(rank)
            if rank.gone or rank.agreement.boundaries.may_pass():
                self.free.add(number)
            last = rank.left or rank.latest == self._actions.world.updates
            if rank.ended and last and not rank.agreement.boundaries.fence:
                self.ended.add(number)
        return number

    def moves(self, number: int) -> tuple[tuple[Do, int], ...]:
        if number not in self._moves:
            self._moves[number] = tuple((do, self.number(rank)) for do, rank in self._actions.of(self.ranks[number]))
        return self._moves[number]

    def rebased(self, number: int, steps: int) -> int:
        if (number, steps) not in self._rebased:
            self._rebased[number, steps] = self.number(self._actions.rebased(self.ranks[number], steps))
        return self._rebased[number, steps]

    def delivered(self, number: int, ballots: tuple[Ballot, ...]) -> int:
        if (number, ballots) not in self._delivered:
            self._delivered[number, ballots] = self.number(replace(self.ranks[number], mail=ballots))
        return self._delivered[number, ballots]


class _Search:
    def __init__(self, world: World) -> None:
        self._world = world
        self._table = _Table(Actions(world))
        self._states: list[_State] = []
        self._numbers: dict[_State, int] = {}
        self._origins: list[tuple[int, Do, int]] = []
        self._sources: list[int] = []
        self._targets: list[int] = []
        self._is_sure = bytearray()
        self._is_round = bytearray()

    def run(self) -> Explored:
        watch = perf_counter()
        actions = Actions(self._world)
        ranks = sorted(self._table.number(actions.start(lead)) for lead in self._world.leads)
        self._add(_State(self._world.budget, False, tuple(ranks)))  # noqa: FBT003 - a field
        ends, free = [], []
        for number, state in enumerate(self._states):
            if self._table.free.issuperset(state.ranks):
                free.append(number)
            try:
                if self._table.ended.issuperset(state.ranks):
                    self._check_end(state)
                    ends.append(number)
                else:
                    self._expand(number, state)
            except (Violation, EplbError) as error:
                raise Violation(f"{error!r}\n{self._way_to(number)}") from error
        self._require_way("the end", ends, self._is_sure)
        self._require_way("boundaries without a fence, by rounds alone", free, self._is_round)
        return Explored(len(self._states), len(self._sources), len(ends), perf_counter() - watch)

    def _add(self, state: _State, origin: tuple[int, Do, int] = (0, Do.BEGIN, 0)) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            if number == MAX_STATES:
                raise RuntimeError(f"more than {MAX_STATES} states")
            self._states.append(state)
            self._origins.append(origin)
        return number

    def _expand(self, number: int, state: _State) -> None:
        """Add all states that follow."""
        table = self._table
        ranks = [table.ranks[rank] for rank in state.ranks]
        for index, old in enumerate(state.ranks):
            if index and old == state.ranks[index - 1]:
                continue
            others = ranks[:index] + ranks[index + 1 :]
            for do, new in table.moves(old):
                moved = table.ranks[new]
                if do in HINDERED and not self._can(do, moved, others, state):
                    continue
                if do in COMMITTING or do is Do.TRANSFER:
                    self._check(do, ranks[index], moved, others)
                numbers = [*state.ranks[:index], new, *state.ranks[index + 1 :]]
                if do is Do.PASS:
                    numbers = self._rebase(numbers)
                elif do is Do.JOIN:
                    numbers = self._deliver(numbers)
                self._connect((number, do, new), state, numbers)
        if Do.QUIET in state.budget:
            self._connect((number, Do.QUIET, state.ranks[0]), state, list(state.ranks))

    def _connect(self, origin: tuple[int, Do, int], state: _State, ranks: list[int]) -> None:
        number, do, _ = origin
        budget = state.budget
        if do in DISTURBANCES:
            at = budget.index(do)
            budget = budget[:at] + budget[at + 1 :]
        ranks.sort()
        self._targets.append(self._add(_State(budget, state.quiet or do is Do.QUIET, tuple(ranks)), origin))
        self._sources.append(number)
        self._is_sure.append(do not in DISTURBANCES and (do is not Do.STAND or state.quiet))
        self._is_round.append(do in {Do.JOIN, Do.RECEIVE})

    def _rebase(self, numbers: list[int]) -> list[int]:
        """Count boundaries from the last that all have passed."""
        ranks = [self._table.ranks[number] for number in numbers]
        steps = min(rank.agreement.boundaries.step for rank in ranks if not rank.gone) - FIRST_BOUNDARY
        return [self._table.rebased(number, steps) for number in numbers] if steps else numbers

    def _deliver(self, numbers: list[int]) -> list[int]:
        """Complete the round, if all have joined it."""
        mails = [self._table.ranks[number].mail for number in numbers]
        ballots = [mail for mail in mails if isinstance(mail, Ballot)]
        if len(ballots) < len(numbers):
            return numbers
        if not all(ballot.standing for ballot in ballots):
            ballots = [replace(ballot, step=0, standing=0) for ballot in ballots]
        in_order = tuple(sorted(ballots, key=_row))
        return [self._table.delivered(number, in_order) for number in numbers]

    def _can(self, do: Do, moved: Rank, others: list[Rank], state: _State) -> bool:
        """Whether the others let a rank do this."""
        if do in DISTURBANCES:
            return do in state.budget
        if do is Do.STAGE:
            return self._world.one_sided or all(other.transfers >= moved.staged for other in others)
        step = moved.agreement.boundaries.step
        steps = [other.agreement.boundaries.step for other in others if not other.gone] or [step]
        if do is Do.PASS:
            return step <= (max(steps) if state.quiet else min(steps) + self._world.skew)
        if do is Do.STAND:
            return step <= min(steps) and (state.quiet or self._world.standing)
        has_come = state.quiet and step >= max(steps)
        return has_come if do is Do.DRAIN else not has_come

    def _check(self, do: Do, rank: Rank, moved: Rank, others: list[Rank]) -> None:
        """Check what a rank just did against the others."""
        agreement = moved.agreement
        goes_on = self._world.updates > 1 and {Do.FAIL, Do.GIVE_UP} & set(self._world.budget)
        in_vain = goes_on and any(other.agreement.generation > agreement.generation for other in others)
        if moved.commits > rank.commits and moved.commits > min(other.staged for other in others):
            raise Violation(f"{moved} commits what is not staged everywhere")
        if do is Do.TRANSFER and self._world.launch_rule is LaunchRule.GRANTED and not in_vain:
            granted = min(other.before + other.agreement.update.launchable for other in others)
            if moved.transfers > granted or min(other.committed for other in others) < moved.before:
                raise Violation(f"{moved} reads what others have not granted")
        if do is Do.PASS:
            here = moved.history[-1]
            for other in others:
                if not other.gone and len(other.history) >= len(moved.history):
                    there = other.history[len(moved.history) - 1]
                    if here != there:
                        raise Violation(
                            f"boundary {agreement.boundaries.step}: launched and committed {here} and {there}"
                        )
        if do is Do.RECEIVE and agreement.update.over and not moved.left:
            ranks = (moved, *others)
            failed = any(rank.agreement.status is Status.FAILED for rank in ranks)
            if (
                not (failed or goes_on)
                and min(rank.committed for rank in ranks) < moved.before + agreement.update.limit
            ):
                raise Violation(f"{moved} is over before all layers are committed")

    def _check_end(self, state: _State) -> None:
        ranks = [self._table.ranks[rank] for rank in state.ranks]
        happened = set(Counter(self._world.budget) - Counter(state.budget))
        begun = {(rank.transfers, rank.staged) for rank in ranks}
        commits = {rank.commits for rank in ranks}
        told = f"{sorted(begun)} begun and staged, {sorted(commits)} committed at the end"
        if len(commits) > 1 or (self._world.ordered_launch and len({rank.transfers for rank in ranks}) > 1):
            raise Violation(told)
        if happened <= {Do.WAITED, Do.CANCEL, Do.QUIET} and begun != {(count, count) for count in commits}:
            raise Violation(told)
        num_failed = len(happened & {Do.FAIL, Do.GIVE_UP})
        if not happened & {Do.CANCEL, Do.LEAVE} and min(commits) < self._world.layers * (
            self._world.updates - num_failed
        ):
            raise Violation(told)
        if happened <= {Do.WAITED, Do.QUIET} and commits != {self._world.layers * self._world.updates}:
            raise Violation(told)

    def _require_way(self, what: str, goal: list[int], allowed: bytearray) -> None:
        """Require that from every state, allowed actions lead to a goal."""
        used = np.frombuffer(allowed, bool)
        sources, targets = np.array(self._sources)[used], np.array(self._targets)[used]
        reached = np.zeros(len(self._states), bool)
        reached[goal] = True
        known = -1
        while known != (known := int(reached.sum())):
            reached[sources[reached[targets]]] = True
        if not reached.all():
            raise Violation(f"no way to {what} from\n{self._way_to(int(np.argmin(reached)))}")

    def _way_to(self, number: int) -> str:
        lines: list[str] = []
        while number:
            number, do, rank = self._origins[number]
            lines.append(f"{do.name:9} {self._table.ranks[rank]}")
        return "\n".join(reversed(lines))
