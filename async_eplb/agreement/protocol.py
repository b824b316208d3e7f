"""Which step a decision takes effect at: a pure state machine over ballots, without sockets or time.

Control rounds go on from open to close. In each, every rank gives a :class:`Ballot` and sees all of them, so that
all ranks draw the same :class:`Verdict`. Counts in ballots are prefix lengths in update order; the minimum over
ranks holds everywhere. Comments cite the rules of docs/design.md.

How a decision gets its step, while the model serves: a round that shows new waves staged everywhere makes every
rank put a *fence* in its next ballot, a boundary that it promises not to pass before that round's result is known.
The result is the largest fence, which no rank can have passed, so the waves are committed there, on all ranks at
the same boundary. A fence is behind all boundaries that were decided before, which steps come to even if its round is
lost. If all ranks stand, that is the boundary before them, and decisions for later ones move
to it, so that nothing waits for steps that nobody makes. In the exclusive mode nobody serves, and waves that
are staged everywhere may be committed at once.

How an update ends early: a rank begins a wave's transfer only when it has a staging buffer, and each of its
``window`` buffers holds a wave until an agreed commit frees it; so nothing beyond ``agreed + window`` can be under
way (granted and ordered launches: nothing beyond what was agreed to be launched). When a round shows a CANCEL, that
number is known to all ranks alike and becomes the update's length: what may be under way is finished and committed,
nothing else is begun, and no posted exchange is left without its other side. After a FAILED nothing more is agreed at
all, but what was agreed before is still committed, everywhere; rounds go on, and while all ranks stand, decisions move
to where they stand as before.

A wave is launched in parts where launches are ordered: one at a boundary, at successive ones, so that what a boundary
costs the serving thread is bounded.
"""

from collections.abc import Iterable, Sequence

from async_eplb.agreement.agreed import Agreed, Counts
from async_eplb.agreement.ballot import Ballot, Status, Verdict
from async_eplb.agreement.boundaries import Boundaries
from async_eplb.agreement.checks import named, require_same_steps, require_same_update
from async_eplb.agreement.lead import Lead
from async_eplb.agreement.rules import LaunchRule, Mode

_LASTING = frozenset({Status.LEAVING, Status.IN_DOUBT})
"""What no end of an update changes."""


class Agreement:
    """The agreement of one EP group, seen from one rank, over the life of an updater.

    The owner advances ``update.staged`` and ``update.finished``, adds to ``update.parts``, hands in :meth:`ballot` for
    every round and gives what the round returned to :meth:`receive`; and passes step boundaries with
    :meth:`Boundaries.pass_next`.

    :param lead: boundaries from the last one passed to a new fence, at least 1; it adapts to waits
    :param launch_rule: when a wave's transfer may begin
    :param max_step_skew: step counts of ranks that are further apart than this are an error
    """

    def __init__(
        self, *, lead: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE, max_step_skew: int = 1000
    ) -> None:
        self.launch_rule = launch_rule
        self.max_step_skew = max_step_skew
        self.members: tuple[int, ...] = ()
        """Ranks that ballots are from, in their order; empty for ranks 0 and up."""
        self.generation = 0
        self.running = False
        self.status = Status.OK
        self.demanded = 0
        self.demand_shown = 0
        """Rebalances that all ranks are known to have heard of."""
        self.missed = 0
        """The latest update that is over on another rank: if this one has not begun it, it never will."""
        self.lead = Lead(lead, lead)
        self.boundaries = Boundaries()
        self.update = Agreed()

    def __repr__(self) -> str:
        update = self.update
        return (
            f"<Agreement generation {self.generation}: {update.staged} staged, {update.agreed} agreed, "
            f"{update.finished} finished of {update.limit}, {self.status.name}, step {self.boundaries.step}, "
            f"fence {self.boundaries.fence}>"
        )

    @property
    def following(self) -> int:
        """Number of the update that begins next here."""
        return max(self.generation, self.missed) + 1

    def begin(self, mode: Mode, *, digest: int, total: int, window: int, generation: int = 0) -> None:
        """Begin the next update.

        :param total: waves of the update
        :param window: waves that can be staged and not yet agreed, the depth of the staging pool
        :param generation: number of the update: without it, :attr:`following`
        """
        self.update = Agreed(mode, digest, total, window)
        self.boundaries.clear()
        self.generation = generation or self.following
        self.running = True
        self.status = Status.OK

    def restart(self, members: Sequence[int], *, generation: int, step: int) -> None:
        """Go on with the remaining ranks, all before the same boundary, and with nothing under way.

        :param step: boundaries that any of them has passed
        """
        self.update = Agreed()
        self.boundaries = Boundaries(step=step, last=step, standing=self.boundaries.standing)
        self.members = tuple(members)
        self.generation = generation
        self.demanded = self.demand_shown = self.missed = 0
        self.running = False
        self.status = Status.OK

    def end(self, *, failed: bool) -> None:
        """End the update here; one that failed is GIVEN_UP, for ranks that come to it later, until the next begins."""
        self.running = False
        self.boundaries.fence_wanted = False
        if self.status not in _LASTING:
            self.status = Status.GIVEN_UP if failed else Status.OK

    def cancel(self) -> None:
        """Ask for the end of the update, unless something worse has happened."""
        if self.running and self.status is Status.OK:
            self.status = Status.CANCEL

    def fail(self) -> None:
        """Give FAILED from now on: this rank cannot go on with the update."""
        if self.status not in {*_LASTING, Status.GIVEN_UP}:
            self.status = Status.FAILED

    def give_up(self) -> None:
        """Give GIVEN_UP from now on, which ends the update whether all ranks have begun it or not."""
        if self.status not in _LASTING:
            self.status = Status.GIVEN_UP

    def doubt(self) -> None:
        """Give IN_DOUBT from now on: this rank cannot go on without a recovery."""
        if self.status is not Status.LEAVING:
            self.status = Status.IN_DOUBT

    def leave(self) -> None:
        """Make the next round the last, because this rank closes."""
        self.status = Status.LEAVING

    def ballot(self) -> Ballot:
        """Return this rank's ballot for the round that it now joins; its fence holds until the result."""
        update, boundaries = self.update, self.boundaries
        if boundaries.fence_wanted:
            boundaries.put_up_fence(self.lead.boundaries)
        return Ballot(
            generation=self.generation,
            digest=update.digest,
            staged=update.staged,
            launchable=update.launchable,
            finished=update.finished,
            fence=boundaries.fence,
            status=self._pending_status(),
            step=boundaries.step,
            standing=int(boundaries.standing),
            demanded=self.demanded,
        )

    def is_eager(self) -> bool:
        """Return whether this rank should join the next round now, rather than after a pause.

        A rank that holds the minimum back pauses until it has moved; the others join at once and wait for it. So
        each round completes as soon as the slowest rank has something new. Finished commits matter once all are made.
        """
        if self.status is Status.LEAVING or self.boundaries.fence_wanted or self.demanded > self.demand_shown:
            return True
        due_while_standing = self.boundaries.standing and bool(self.boundaries.decisions)
        if not self.running or self.update.over:
            return self.running and due_while_standing
        return (
            not self.update.begun
            or self._pending_status() is not Status.OK
            or due_while_standing
            or self._has_news(self.update)
        )

    def _has_news(self, update: Agreed) -> bool:
        """Return whether this rank is ahead of what the last round showed of all ranks."""
        return (
            update.staged > update.seen.staged
            or update.finished >= update.limit > update.seen.finished
            or (self.launch_rule is not LaunchRule.AT_ONCE and update.launchable > update.seen.launchable)
        )

    def receive(self, ballots: Sequence[Ballot]) -> Verdict:
        """Draw the verdict of one round from its ballots, in rank order.

        :raises GenerationMismatch: if ranks have begun different numbers of updates
        :raises PlacementDisagreement: if ranks began the same update with different inputs
        :raises StepMismatch: if ranks have passed different numbers of boundaries
        """
        update, boundaries = self.update, self.boundaries
        boundaries.fence = 0
        boundaries.fence_wanted = False
        self.demand_shown = min(ballot.demanded for ballot in ballots)
        self.demanded = max(self.demanded, *(ballot.demanded for ballot in ballots))
        self.missed = max(self.missed, *(each.generation - (each.status is not Status.GIVEN_UP) for each in ballots))
        gone = self._ranks(ballots, Status.LEAVING)
        if gone:
            update.over = update.over or self.running
            return self._verdict(gone=gone)
        if not self.running or update.over:
            return self._verdict(self._move_decisions_forward(ballots))
        waiting_for = require_same_update(ballots, self.generation, self.members)
        if waiting_for:
            given_up = self._given_up(ballots)
            update.over = bool(given_up)
            return Verdict(waiting_for=waiting_for, failed=given_up, over=update.over)
        if update.mode is Mode.SERVING:
            boundaries.stood_before = require_same_steps(ballots, boundaries.stood_before, self.max_step_skew)
        return self._decide(ballots)

    def fail_here(self) -> Verdict:
        """End the update, because its ballots contradict each other; all ranks that have begun it see that."""
        self.update.over, self.update.void = True, self.update.begun
        return Verdict(over=True)

    def is_in_doubt(self) -> bool:
        """Return whether a round that is under way may decide, for other ranks, that waves are committed."""
        update = self.update
        exclusive = self.running and not update.over and update.mode is Mode.EXCLUSIVE
        return self.boundaries.fence > 0 or (exclusive and update.staged > update.agreed)

    def ranks_in_doubt(self, ballots: Sequence[Ballot]) -> tuple[int, ...]:
        """Return the ranks that cannot go on without a recovery."""
        return self._ranks(ballots, Status.IN_DOUBT)

    def named(self, places: Iterable[int]) -> tuple[int, ...]:
        """Return the ranks whose ballots are at these places."""
        return named(self.members, places)

    def _decide(self, ballots: Sequence[Ballot]) -> Verdict:
        update = self.update
        failed = self._ranks(ballots, Status.FAILED, Status.IN_DOUBT, Status.GIVEN_UP)
        cancelled = self._ranks(ballots, Status.CANCEL)
        update.seen = Counts.least(ballots)
        boundary = 0
        if failed:  # agreement rule 5: what was agreed stays agreed, and nothing is added
            update.over, update.void = True, update.begun
            return self._verdict(failed=failed, cancelled=cancelled)
        if cancelled and not update.ending:
            update.ending = True
            update.limit = min(update.limit, self._under_way()) if update.begun else 0
        elif update.mode is Mode.EXCLUSIVE:
            update.agreed, update.launched = self._everywhere()
        else:
            boundary = self._decide_for_a_boundary(ballots)
        update.begun = True
        self.boundaries.fence_wanted = update.mode is Mode.SERVING and (
            self._is_more_ready() or self._is_out_of_reach(ballots)
        )
        update.over = update.seen.finished >= update.limit  # agreement rule 7
        return self._verdict(boundary, cancelled=cancelled)

    def _decide_for_a_boundary(self, ballots: Sequence[Ballot]) -> int:
        """Agree on what is ready everywhere, if every rank has put up a fence; return the boundary, or 0."""
        update = self.update
        if self.launch_rule is LaunchRule.GRANTED:
            update.launched = self._everywhere()[1]
        fences = [ballot.fence for ballot in ballots]
        if not all(fences) or not (self._is_more_ready() or max(fences) < self.boundaries.last):
            return 0
        boundary = max(fences)  # agreement rule 1: no rank can have passed it
        self._agree(boundary, *self._everywhere())
        return boundary

    def _verdict(
        self,
        boundary: int = 0,
        *,
        cancelled: tuple[int, ...] = (),
        failed: tuple[int, ...] = (),
        gone: tuple[int, ...] = (),
    ) -> Verdict:
        update = self.update
        return Verdict(boundary, update.agreed, update.launched, update.over, cancelled, failed, gone)

    def _is_more_ready(self) -> bool:
        """Return whether more can be agreed than has been."""
        return self._everywhere() != (self.update.agreed, self.update.launched)

    def _is_out_of_reach(self, ballots: Sequence[Ballot]) -> bool:
        """Return whether all ranks stand, and before an earlier boundary than the last that was decided for."""
        return all(ballot.standing and ballot.step + 1 < self.boundaries.last for ballot in ballots)

    def _everywhere(self) -> tuple[int, int]:
        """Return the waves that every rank has staged, and those that every rank can launch."""
        update = self.update
        staged = min(update.limit, update.seen.staged)
        launchable = 0 if self.launch_rule is LaunchRule.AT_ONCE else min(update.limit, update.seen.launchable)
        return max(staged, update.agreed), max(launchable, update.launched)

    def _move_decisions_forward(self, ballots: Sequence[Ballot]) -> int:
        """Make what was agreed before the end due where all ranks stand; return that boundary, 0 if they do not."""
        # Agreement rule 8: nobody steps to the boundaries that were decided for.
        fences = [ballot.fence for ballot in ballots]
        here = max(fences) if all(fences) else self.boundaries.last
        moves = here < self.boundaries.last
        if moves:
            self._agree(here, self.update.agreed, self.update.launched)
        self.boundaries.fence_wanted = self._is_out_of_reach(ballots)
        return here if moves else 0

    def _agree(self, boundary: int, agreed: int, launched: int) -> None:
        before = self._parts_launched()
        self.update.agreed, self.update.launched = agreed, launched
        self.boundaries.decide(boundary, agreed, range(before + 1, self._parts_launched() + 1) or (before,))
        self.lead.decided()

    def _parts_launched(self) -> int:
        """Return the parts of the waves whose launch at boundaries is agreed."""
        return sum(self.update.parts[: self.update.launched]) if self.launch_rule.needs_order else 0

    def _under_way(self) -> int:
        """Return the waves whose transfer can have begun on any rank."""
        update = self.update
        if self.launch_rule.needs_grant or (self.launch_rule.needs_order and update.mode is Mode.SERVING):
            return max(update.launched, update.agreed)
        return update.agreed + update.window  # rule 9: no buffer, no transfer

    def _pending_status(self) -> Status:
        """Return the status; a cancellation only until some round has shown one."""
        return Status.OK if self.update.ending and self.status is Status.CANCEL else self.status

    def _given_up(self, ballots: Sequence[Ballot]) -> tuple[int, ...]:
        """Return the ranks that have given this update up, while others have not begun it."""
        here = (Status.GIVEN_UP, self.generation)
        return self.named(place for place, each in enumerate(ballots) if (each.status, each.generation) == here)

    def _ranks(self, ballots: Sequence[Ballot], *statuses: Status) -> tuple[int, ...]:
        return self.named(place for place, ballot in enumerate(ballots) if ballot.status in statuses)
