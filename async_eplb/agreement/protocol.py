"""Which step a decision takes effect at: a pure state machine over ballots, without sockets or time.

Control rounds go on from open to close. In each, every rank gives a :class:`Ballot` and sees all of them, so that
all ranks draw the same :class:`Verdict`. Counts in ballots are prefix lengths in update order; the minimum over
ranks holds everywhere.

How a decision gets its step, while the model serves: a round that shows new layers staged everywhere makes every
rank put a *fence* in its next ballot, a boundary that it promises not to pass before that round's result is known.
The result is the largest fence, which no rank can have passed, so the layers are committed there, on all ranks at
the same boundary. A fence is behind all boundaries that were decided before, which steps come to even if its round is
lost. If all ranks stand, that is the boundary before them, and what was decided for later ones comes
forward to it, so that nothing waits for steps that nobody makes. In the exclusive mode nobody serves, and layers that
are staged everywhere may be committed at once.

How an update ends early: a rank begins a layer's transfer only when it has a staging buffer, and each of its
``window`` buffers holds a layer until an agreed commit frees it; so nothing beyond ``agreed + window`` can be under
way (granted and ordered launches: nothing beyond what was agreed to be launched). When a round shows a CANCEL, that
number is known to all ranks alike and becomes the update's length: what may be under way is finished and committed,
nothing else is begun, and no posted exchange is left without its other side. After a FAILED nothing more is agreed at
all, but what was agreed before is still committed, everywhere; rounds go on, and while all ranks stand it comes
forward as before.

A layer is launched in parts where launches are ordered: one at a boundary, at successive ones, so that what a boundary
costs the serving thread is bounded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from async_eplb.agreement.ballot import Ballot, Decision, Status, Verdict, differing_ranks
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import GenerationMismatch, PlacementDisagreement, StepMismatch

MAX_LEAD = 64
"""Boundaries that a fence is ahead at most."""
_CALM_DECISIONS = 64
"""Decisions without a wait after which the lead is halved."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Minimum over all ranks, as the last round that counted showed it."""

    staged: int = 0
    launchable: int = 0
    committed: int = 0


class Agreement:
    """The agreement of one EP group, seen from one rank, over the life of an updater.

    The owner advances :attr:`staged` and :attr:`committed`, adds to :attr:`parts`, hands in :meth:`ballot` for every
    round and gives what the round returned to :meth:`receive`; and passes step boundaries with :meth:`pass_boundary`.

    :param lead: boundaries from the last one passed to a new fence, at least 1; it adapts to waits
    :param launch_rule: when a layer's transfer may begin
    :param max_step_skew: step counts of ranks that are further apart than this are an error
    """

    def __init__(
        self, *, lead: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE, max_step_skew: int = 1000
    ) -> None:
        self.lead = lead
        self._least_lead = lead
        self.launch_rule = launch_rule
        self.members: tuple[int, ...] = ()
        """Whom ballots are from, in their order, if not from ranks 0 and up."""
        self.max_step_skew = max_step_skew
        self.generation = 0
        self.step = 0
        self.fence = 0
        self.last_boundary = 0
        self.standing = False
        self.demanded = 0
        self.running = False
        self.status = Status.OK
        self._calm = 0
        self._demand_shown = 0
        self._reset(Mode.EXCLUSIVE, 0, 0, 0)

    def _reset(self, mode: Mode, digest: int, total: int, window: int) -> None:
        self.mode = mode
        self.digest = digest
        self.limit = total
        self.window = window
        self.staged = 0
        self.parts: tuple[int, ...] = ()
        """Of each launchable layer, how many it is launched in; the same on all ranks."""
        self.committed = 0
        self.agreed = 0
        self.launched = 0
        self.begun = False
        self.over = False
        self.decisions: tuple[Decision, ...] = ()
        self._seen = _Counts()
        self._ending = False
        self._fence_wanted = False
        self._stood_before = 0

    def __repr__(self) -> str:
        return (
            f"<Agreement generation {self.generation}: {self.staged} staged, {self.agreed} agreed, "
            f"{self.committed} committed of {self.limit}, {self.status.name}, step {self.step}, fence {self.fence}>"
        )

    @property
    def launchable(self) -> int:
        """Layers that have a plan and buffers here."""
        return len(self.parts)

    def begin(self, mode: Mode, *, digest: int, total: int, window: int) -> None:
        """Begin the next update.

        :param total: layers of the update
        :param window: layers that can be staged and not yet agreed, the depth of the staging pool
        """
        self._reset(mode, digest, total, window)
        self.generation += 1
        self.running = True
        self.status = Status.OK

    def restart(self, members: Sequence[int], *, generation: int, step: int) -> None:
        """Go on with the ranks that are left, all before the same boundary, and with nothing under way.

        :param step: boundaries that any of them has passed
        """
        self._reset(Mode.EXCLUSIVE, 0, 0, 0)
        self.members = tuple(members)
        self.generation, self.step = generation, step
        self.fence, self.last_boundary = 0, step
        self.demanded = self._demand_shown = 0
        self.running = False
        self.status = Status.OK

    def end(self, *, broken: bool) -> None:
        """Say that the update has ended here; a broken rank says FAILED to whatever comes."""
        self.running = False
        self._fence_wanted = False
        if self.status is not Status.LEAVING:
            self.status = Status.FAILED if broken else Status.OK

    def cancel(self) -> None:
        """Ask for the end of the update, unless something worse has happened."""
        if self.running and self.status is Status.OK:
            self.status = Status.CANCEL

    def fail(self) -> None:
        """Say that this rank cannot go on."""
        if self.status is not Status.LEAVING:
            self.status = Status.FAILED

    def leave(self) -> None:
        """Say that this rank closes: the next round is its last."""
        self.status = Status.LEAVING

    def ballot(self) -> Ballot:
        """Return what this rank says in the round that it now joins, and hold to its fence until the result."""
        if self._fence_wanted:
            ahead = max(self.step + self.lead, self.last_boundary + 1)
            self.fence = self.step + 1 if self.standing else ahead
        return Ballot(
            generation=self.generation,
            digest=self.digest,
            staged=self.staged,
            launchable=self.launchable,
            committed=self.committed,
            fence=self.fence,
            status=self._pending_status(),
            step=self.step,
            standing=int(self.standing),
            demanded=self.demanded,
        )

    def is_eager(self) -> bool:
        """Whether this rank should join the next round now, rather than after a pause.

        A rank that holds the minimum back pauses until it has moved; the others join at once and wait for it. So
        each round completes as soon as the slowest rank has something to say. Commits matter once all are made.
        """
        if self.status is Status.LEAVING or self._fence_wanted or self.demanded > self._demand_shown:
            return True
        if self.over:
            return self.running and self.standing and bool(self.decisions)
        return self.running and (
            not self.begun
            or self._pending_status() is not Status.OK
            or bool(self.standing and self.decisions)
            or self.staged > self._seen.staged
            or self.committed >= self.limit > self._seen.committed
            or (self.launch_rule is not LaunchRule.AT_ONCE and self.launchable > self._seen.launchable)
        )

    def receive(self, ballots: Sequence[Ballot]) -> Verdict:
        """Take in one round's ballots, in rank order.

        :raises GenerationMismatch: if ranks have begun different numbers of updates
        :raises PlacementDisagreement: if ranks began the same update with different inputs
        :raises StepMismatch: if ranks have passed different numbers of boundaries
        """
        fences = [ballot.fence for ballot in ballots]
        self.fence = 0
        self._fence_wanted = False
        self._demand_shown = min(ballot.demanded for ballot in ballots)
        self.demanded = max(self.demanded, *(ballot.demanded for ballot in ballots))
        left = self._ranks(ballots, Status.LEAVING)
        if left:
            self.over = self.over or self.running
            return Verdict(agreed=self.agreed, launched=self.launched, over=self.over, left=left)
        if not self.running or self.over:
            boundary = self._bring_forward(ballots, fences)
            return Verdict(boundary, agreed=self.agreed, launched=self.launched, over=self.over)
        waiting_for = self._require_same_update(ballots)
        if waiting_for:
            return Verdict(waiting_for=waiting_for)
        self._require_same_steps(ballots)
        return self._decide(ballots, fences)

    def is_in_doubt(self) -> bool:
        """Whether a round that is under way may decide, for other ranks, that layers are committed."""
        exclusive = self.running and not self.over and self.mode is Mode.EXCLUSIVE
        return self.fence > 0 or (exclusive and self.staged > self.agreed)

    def may_pass(self) -> bool:
        """Whether the next boundary may be passed now; otherwise the result of a round must come first."""
        return not self.fence or self.step + 1 < self.fence

    def pass_boundary(self) -> Decision | None:
        """Pass the next boundary; return what is to be done there.

        :raises RuntimeError: if that would break a promise; and nothing happens
        """
        if not self.may_pass():
            raise RuntimeError(f"boundary {self.step + 1} is behind the fence: {self!r}")
        self.step += 1
        return self._due(self.step)

    def stand(self) -> Decision | None:
        """Return what is to be done at the next boundary, while this rank stands before it without passing."""
        return self._due(self.step + 1)

    def drain(self) -> Decision | None:
        """Return all that is to be done at boundaries to come, for a rank that makes no more steps."""
        return self._due(self.last_boundary)

    def waited(self) -> None:
        """Say that a step had to wait at its fence: later fences are further ahead."""
        self.lead = min(2 * self.lead, MAX_LEAD)
        self._calm = 0

    def _due(self, boundary: int) -> Decision | None:
        due = [decision for decision in self.decisions if decision.boundary <= boundary]
        self.decisions = self.decisions[len(due) :]
        return due[-1] if due else None

    def _decide(self, ballots: Sequence[Ballot], fences: Sequence[int]) -> Verdict:
        failed, cancelled = self._ranks(ballots, Status.FAILED), self._ranks(ballots, Status.CANCEL)
        self._seen = _Counts(
            staged=min(ballot.staged for ballot in ballots),
            launchable=min(ballot.launchable for ballot in ballots),
            committed=min(ballot.committed for ballot in ballots),
        )
        boundary = 0
        if failed:
            self.over = True
            return Verdict(agreed=self.agreed, launched=self.launched, over=True, failed=failed, cancelled=cancelled)
        if cancelled and not self._ending:
            self._ending = True
            self.limit = min(self.limit, self._under_way()) if self.begun else 0
        elif self.mode is Mode.EXCLUSIVE:
            self.agreed, self.launched = self._everywhere()
        else:
            if self.launch_rule is LaunchRule.GRANTED:
                self.launched = self._everywhere()[1]
            if all(fences) and (self._is_more_ready() or max(fences) < self.last_boundary):
                boundary = max(fences)
                self._agree(boundary, *self._everywhere())
        self.begun = True
        self._fence_wanted = self.mode is Mode.SERVING and (self._is_more_ready() or self._is_out_of_reach(ballots))
        self.over = self._seen.committed >= self.limit
        return Verdict(boundary, self.agreed, self.launched, self.over, cancelled=cancelled)

    def _is_more_ready(self) -> bool:
        """Whether more can be agreed than has been."""
        return self._everywhere() != (self.agreed, self.launched)

    def _is_out_of_reach(self, ballots: Sequence[Ballot]) -> bool:
        """Whether all ranks stand, and before an earlier boundary than the last that was decided for."""
        return all(ballot.standing and ballot.step + 1 < self.last_boundary for ballot in ballots)

    def _everywhere(self) -> tuple[int, int]:
        """Return the layers that every rank has staged, and those that every rank can launch."""
        staged = min(self.limit, self._seen.staged)
        launchable = 0 if self.launch_rule is LaunchRule.AT_ONCE else min(self.limit, self._seen.launchable)
        return max(staged, self.agreed), max(launchable, self.launched)

    def _bring_forward(self, ballots: Sequence[Ballot], fences: Sequence[int]) -> int:
        """Let what was agreed before the end come to where all ranks stand; return that boundary, 0 if they do not."""
        here = max(fences) if all(fences) else self.last_boundary
        comes = here < self.last_boundary
        if comes:
            self._agree(here, self.agreed, self.launched)
        self._fence_wanted = self._is_out_of_reach(ballots)
        return here if comes else 0

    def _agree(self, boundary: int, agreed: int, launched: int) -> None:
        before = self._parts_launched()
        self.agreed, self.launched = agreed, launched
        later = range(before + 1, self._parts_launched() + 1) or (before,)
        decisions = (Decision(boundary + n, self.agreed, launched) for n, launched in enumerate(later))
        self.decisions = (*(each for each in self.decisions if each.boundary < boundary), *decisions)
        self.last_boundary = self.decisions[-1].boundary
        self._calm += 1
        if self._calm >= _CALM_DECISIONS:
            self._calm = 0
            self.lead = max(self._least_lead, self.lead // 2)

    def _parts_launched(self) -> int:
        """Return the parts of the layers whose launch at boundaries is agreed."""
        return sum(self.parts[: self.launched]) if self.launch_rule.needs_order else 0

    def _under_way(self) -> int:
        """Return the layers whose transfer can have begun on any rank."""
        if self.launch_rule.needs_grant or (self.launch_rule.needs_order and self.mode is Mode.SERVING):
            return max(self.launched, self.agreed)
        return self.agreed + self.window

    def _pending_status(self) -> Status:
        """A cancellation is said until some round has shown one; the rest always."""
        return Status.OK if self._ending and self.status is Status.CANCEL else self.status

    def _require_same_update(self, ballots: Sequence[Ballot]) -> tuple[int, ...]:
        """Return the ranks that have not begun this update yet."""
        generations = tuple(ballot.generation for ballot in ballots)
        if max(generations) > self.generation or min(generations) < self.generation - 1:
            raise GenerationMismatch(
                f"ranks have begun {list(generations)} updates; every rank must begin every update, in the same order",
                generations=generations,
            )
        behind = self.named(place for place, number in enumerate(generations) if number < self.generation)
        if behind:
            return behind
        digests = tuple(ballot.digest for ballot in ballots)
        ranks = self.named(differing_ranks(digests))
        if ranks:
            raise PlacementDisagreement(
                f"ranks {list(ranks)} began update {self.generation} with another placement, topology, weight layout, "
                "mode or options than the others; nothing was moved",
                digests=digests,
                ranks=ranks,
            )
        return ()

    def _require_same_steps(self, ballots: Sequence[Ballot]) -> None:
        """Refuse ranks that skipped steps.

        Ranks that all stand have passed the same boundaries, but a ballot may be from before its rank went on. The
        next one is not: its rank had seen how far the others had come when they gave theirs.
        """
        if self.mode is Mode.EXCLUSIVE:
            return
        steps = tuple(ballot.step for ballot in ballots)
        standing = all(ballot.standing for ballot in ballots)
        fell_behind = standing and min(steps) < self._stood_before
        self._stood_before = max(steps) if standing else 0
        if fell_behind or max(steps) - min(steps) > self.max_step_skew:
            raise StepMismatch(
                f"ranks have passed {list(steps)} step boundaries; every rank must call step() once for every forward "
                "pass, dummy passes included",
                steps=steps,
            )

    def _ranks(self, ballots: Sequence[Ballot], status: Status) -> tuple[int, ...]:
        return self.named(place for place, ballot in enumerate(ballots) if ballot.status is status)

    def named(self, places: Iterable[int]) -> tuple[int, ...]:
        """Return the ranks whose ballots are at these places."""
        return tuple(self.members[place] if self.members else place for place in places)
