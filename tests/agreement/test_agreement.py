"""The rules of the agreement, one by one. That they are enough is shown in ``test_agreement_search``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agreement_model import copied

from async_eplb.agreement.ballot import Ballot, Decision, Status, Verdict
from async_eplb.agreement.lead import MAX_LEAD
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import GenerationMismatch, PlacementDisagreement, StepMismatch

READY = Ballot(generation=1, digest=7, staged=0, launchable=0, finished=0, fence=0, status=Status.OK)
ONE_STAGED = replace(READY, staged=1)


def serving(
    *, total: int = 4, window: int = 2, lead: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE
) -> Agreement:
    """Return an agreement in an update that all ranks have begun, beside a model that serves."""
    agreement = Agreement(lead=lead, launch_rule=launch_rule)
    agreement.begin(Mode.SERVING, digest=7, total=total, window=window)
    agreement.receive([READY, READY])
    return agreement


def exclusive(*, total: int = 4, window: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE) -> Agreement:
    """Return an agreement in an update that all ranks have begun, beside nothing."""
    agreement = Agreement(launch_rule=launch_rule)
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=total, window=window)
    agreement.receive([READY, READY])
    return agreement


def decided(agreement: Agreement, *fences: int, staged: int = 1) -> Verdict:
    """Let layers be staged everywhere, and decided for the largest of the fences."""
    agreement.receive([replace(READY, staged=staged)] * len(fences))
    agreement.ballot()
    return agreement.receive([replace(READY, staged=staged, fence=fence) for fence in fences])


def passed(agreement: Agreement, boundaries: int) -> list[Decision | None]:
    """Pass boundaries and return what was due at each."""
    return [agreement.boundaries.pass_next() for _ in range(boundaries)]


# Fences


def test_no_fence_without_news() -> None:
    """Nothing is staged everywhere, so nobody promises anything."""
    agreement = serving()
    agreement.receive([ONE_STAGED, READY])
    assert agreement.ballot().fence == 0


def test_news_put_a_fence_in_the_next_ballot() -> None:
    """A round that shows a layer staged everywhere makes every rank promise not to pass a boundary."""
    agreement = serving(lead=3)
    agreement.receive([ONE_STAGED, ONE_STAGED])
    assert agreement.ballot().fence == 3


def test_a_fence_is_ahead_of_the_step_of_the_ballot() -> None:
    """Boundaries passed between the news and the ballot move the fence."""
    agreement = serving(lead=3)
    agreement.receive([ONE_STAGED, ONE_STAGED])
    passed(agreement, 5)
    assert agreement.ballot().fence == 8


def test_a_fence_is_behind_the_last_boundary() -> None:
    """If its round is lost, what was decided before can still be done by steps; and a boundary has one decision."""
    agreement = serving()
    decided(agreement, 2, 9)
    agreement.receive([replace(READY, staged=2)] * 2)
    assert agreement.ballot().fence == 10


def test_the_fence_of_a_standing_rank_is_the_boundary_before_it() -> None:
    """Whatever its lead, and whatever was decided for later."""
    agreement = serving(lead=5)
    decided(agreement, 2, 9)
    agreement.boundaries.standing = True
    agreement.receive([replace(READY, staged=2)] * 2)
    assert agreement.ballot().fence == 1


@pytest.mark.parametrize(("step", "may"), [(0, True), (1, True), (2, False)])
def test_a_fence_holds_its_own_boundary(step: int, *, may: bool) -> None:
    """Boundaries before the fence may be passed, the fence itself may not."""
    agreement = serving(lead=3)
    agreement.receive([ONE_STAGED, ONE_STAGED])
    agreement.ballot()
    passed(agreement, step)
    assert agreement.boundaries.may_pass() is may


def test_passing_a_fence_is_refused() -> None:
    """It raises, and nothing happens."""
    agreement = serving(lead=1)
    agreement.receive([ONE_STAGED, ONE_STAGED])
    agreement.ballot()
    before = copied(agreement)
    with pytest.raises(RuntimeError, match="boundary 1 is behind the fence"):
        agreement.boundaries.pass_next()
    assert repr(vars(agreement)) == repr(vars(before))


def test_any_result_lifts_the_fence() -> None:
    """A round that decides nothing ends the promise that was made for it, too."""
    agreement = serving(lead=1)
    agreement.receive([ONE_STAGED, ONE_STAGED])
    agreement.ballot()
    agreement.receive([replace(ONE_STAGED, fence=1), replace(ONE_STAGED, fence=1, status=Status.CANCEL)])
    assert agreement.boundaries.may_pass()


# Decisions


def test_layers_are_decided_for_the_largest_fence() -> None:
    """No rank can have passed it, for each has promised less."""
    assert decided(serving(), 3, 5, 4) == Verdict(boundary=5, agreed=1)


def test_what_is_staged_on_all_ranks_is_decided() -> None:
    """Counts are prefixes: the smallest holds everywhere, as of the ballots with the fences."""
    agreement = serving()
    agreement.receive([ONE_STAGED, ONE_STAGED])
    verdict = agreement.receive([replace(READY, staged=staged, fence=2) for staged in (4, 2, 3)])
    assert verdict.agreed == 2


def test_nothing_is_decided_without_everyones_fence() -> None:
    """A rank that has promised nothing may be past any boundary."""
    agreement = serving()
    agreement.receive([ONE_STAGED, ONE_STAGED])
    assert agreement.receive([replace(ONE_STAGED, fence=2), ONE_STAGED]) == Verdict()


def test_a_decision_is_due_at_its_boundary_once() -> None:
    """Nothing is due before, and nothing after."""
    agreement = serving()
    decided(agreement, 2, 3)
    assert passed(agreement, 4) == [None, None, Decision(3, 1, 0), None]


def test_decisions_for_one_boundary_are_one() -> None:
    """All layers decided for a boundary are committed in one go there."""
    agreement = serving()
    decided(agreement, 3, 3, staged=1)
    decided(agreement, 3, 3, staged=2)
    assert passed(agreement, 3) == [None, None, Decision(3, 2, 0)]


def test_a_later_decision_leaves_earlier_ones() -> None:
    """Each layer is committed at its own boundary."""
    agreement = serving()
    decided(agreement, 2, 2, staged=1)
    decided(agreement, 3, 3, staged=2)
    assert passed(agreement, 3) == [None, Decision(2, 1, 0), Decision(3, 2, 0)]


def test_ordered_launches_are_decided_too() -> None:
    """At one boundary, first commits, then one part of what is launched; other parts follow at the next ones."""
    agreement = serving(launch_rule=LaunchRule.ORDERED)
    agreement.update.parts = (2, 1, 1)
    ballot = replace(READY, staged=1, launchable=3)
    agreement.receive([ballot, ballot])
    verdict = agreement.receive([replace(ballot, fence=1), replace(ballot, launchable=2, fence=1)])
    assert verdict == Verdict(boundary=1, agreed=1, launched=2)
    assert passed(agreement, 3) == [Decision(n, copied=1, parts_launched=n) for n in (1, 2, 3)]


def test_launches_are_nobodys_matter_without_order() -> None:
    """A transport that needs no order launches when it likes."""
    agreement = serving()
    agreement.receive([replace(READY, launchable=3)] * 2)
    assert agreement.ballot().fence == 0


def test_a_layer_is_granted_when_all_ranks_can_launch_it() -> None:
    """It needs no boundary, so nobody promises any."""
    agreement = serving(launch_rule=LaunchRule.GRANTED)
    verdict = agreement.receive([replace(READY, launchable=launchable) for launchable in (3, 2)])
    assert verdict == Verdict(launched=2)
    assert agreement.ballot().fence == 0


def test_granted_layers_are_not_launched_at_boundaries() -> None:
    """They are from the background, as soon as they are granted."""
    agreement = serving(launch_rule=LaunchRule.GRANTED)
    agreement.receive([replace(READY, launchable=2)] * 2)
    decided(agreement, 1, 1)
    assert passed(agreement, 1) == [Decision(1, copied=1, parts_launched=0)]


def test_layers_are_granted_in_the_exclusive_mode_too() -> None:
    """A transport that reads peers' weights asks for it whoever runs beside it."""
    agreement = exclusive(launch_rule=LaunchRule.GRANTED)
    assert agreement.receive([replace(READY, launchable=1)] * 2) == Verdict(launched=1)


def test_the_exclusive_mode_decides_at_once() -> None:
    """Nobody serves, so there is neither boundary nor fence."""
    agreement = exclusive()
    assert agreement.receive([ONE_STAGED, replace(READY, staged=2)]) == Verdict(agreed=1)
    agreement.receive([replace(READY, staged=2, status=Status.CANCEL)] * 2)
    assert agreement.ballot().fence == 0


@pytest.mark.parametrize(("committed", "over"), [(1, False), (2, True)])
def test_an_update_is_over_when_all_is_committed_everywhere(committed: int, *, over: bool) -> None:
    """The copies have finished on every device, not just been enqueued."""
    agreement = serving(total=2)
    decided(agreement, 2, 2, staged=2)
    verdict = agreement.receive([replace(READY, staged=2, finished=count) for count in (2, committed)])
    assert verdict.over is over


def test_an_update_of_no_layers_is_over_at_once() -> None:
    """The first round that shows it begun everywhere ends it."""
    assert serving(total=0).update.over


# Ranks that stand


def test_a_standing_rank_does_what_is_due_before_it() -> None:
    """It passes no boundary for that, and does nothing twice."""
    agreement = serving()
    decided(agreement, 1, 1)
    assert (agreement.boundaries.due_next(), agreement.boundaries.due_next(), agreement.boundaries.step) == (
        Decision(1, 1, 0),
        None,
        0,
    )


def test_a_standing_rank_leaves_what_is_due_later() -> None:
    """Others may go on, and come to that boundary with the old weights."""
    agreement = serving()
    decided(agreement, 1, 2)
    assert agreement.boundaries.due_next() is None


def test_decisions_come_forward_when_all_stand() -> None:
    """Nobody makes steps, so the boundary that they stand before takes the place of later ones."""
    agreement = serving()
    decided(agreement, 3, 4)
    agreement.boundaries.standing = True
    standing = replace(ONE_STAGED, standing=1)
    agreement.receive([standing, standing])
    fenced = replace(standing, fence=agreement.ballot().fence)
    assert agreement.receive([fenced, fenced]) == Verdict(boundary=1, agreed=1)
    assert agreement.boundaries.due_next() == Decision(1, 1, 0)


def test_decisions_stay_when_a_rank_goes_on() -> None:
    """The fence of a rank that makes steps is not before them."""
    agreement = serving()
    decided(agreement, 3, 4)
    standing = replace(ONE_STAGED, standing=1)
    agreement.receive([standing, standing])
    assert agreement.receive([replace(standing, fence=1), replace(ONE_STAGED, fence=4)]).boundary == 0
    assert passed(agreement, 4)[-1] == Decision(4, 1, 0)


def test_a_rank_that_makes_no_more_steps_drains() -> None:
    """It does now what others do at boundaries to come."""
    agreement = serving()
    decided(agreement, 2, 2, staged=1)
    decided(agreement, 7, 7, staged=2)
    assert (agreement.boundaries.due_ever(), agreement.boundaries.due_ever()) == (Decision(7, 2, 0), None)


# The end before the end


def test_a_cancellation_voids_its_round() -> None:
    """The layers in it are decided by a later round, if they are still part of the update."""
    agreement = serving()
    agreement.receive([ONE_STAGED, ONE_STAGED])
    cancelled = [replace(ONE_STAGED, fence=2), replace(ONE_STAGED, fence=2, status=Status.CANCEL)]
    assert agreement.receive(cancelled) == Verdict(cancelled=(1,))
    assert agreement.ballot().fence == 2


def test_a_cancelled_update_ends_after_what_can_be_under_way() -> None:
    """Each of the window's buffers may be filling."""
    agreement = serving(total=9, window=2)
    decided(agreement, 2, 2, staged=3)
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    assert agreement.update.limit == 5


def test_a_cancelled_update_does_not_get_longer() -> None:
    """The window reaches beyond its last layer."""
    agreement = serving(total=3, window=2)
    decided(agreement, 2, 2, staged=2)
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    assert agreement.update.limit == 3


def test_a_cancelled_update_ends_after_what_was_launched() -> None:
    """With ordered launches nothing else can be under way."""
    agreement = serving(total=9, window=4, launch_rule=LaunchRule.ORDERED)
    ballot = replace(READY, launchable=2)
    agreement.receive([ballot, ballot])
    agreement.receive([replace(ballot, fence=2)] * 2)
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    assert agreement.update.limit == 2


@pytest.mark.parametrize("begin", [serving, exclusive])
def test_a_cancelled_update_ends_after_what_was_granted(begin: Callable[..., Agreement]) -> None:
    """What the round of the cancellation itself would have granted is not."""
    agreement = begin(total=9, window=4, launch_rule=LaunchRule.GRANTED)
    agreement.receive([replace(READY, launchable=2)] * 2)
    agreement.receive([replace(READY, launchable=3), replace(READY, launchable=3, status=Status.CANCEL)])
    assert agreement.update.limit == 2
    assert agreement.receive([replace(READY, launchable=3)] * 2).launched == 2


def test_an_update_cancelled_before_it_began_does_nothing() -> None:
    """Nobody transfers before a round has shown that all have begun."""
    agreement = Agreement()
    agreement.begin(Mode.SERVING, digest=7, total=4, window=2)
    verdict = agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    assert verdict == Verdict(over=True, cancelled=(1,))


def test_a_second_cancellation_changes_nothing() -> None:
    """The length of the update is settled, and the round counts."""
    agreement = exclusive(total=9)
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    verdict = agreement.receive([ONE_STAGED, replace(ONE_STAGED, status=Status.CANCEL)])
    assert (verdict.agreed, agreement.update.limit) == (1, 2)


def test_layers_beyond_the_limit_are_not_decided() -> None:
    """Those that were planned when the cancellation came are never launched."""
    agreement = serving(launch_rule=LaunchRule.ORDERED)
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    ready = replace(READY, launchable=2)
    assert agreement.receive([ready, ready]) == Verdict(over=True)


def test_a_rank_cancels_until_a_round_shows_it() -> None:
    """Once some rank has cancelled, the others need not."""
    agreement = serving()
    agreement.cancel()
    assert agreement.ballot().status is Status.CANCEL
    agreement.receive([READY, replace(READY, status=Status.CANCEL)])
    assert agreement.ballot().status is Status.OK


@pytest.mark.parametrize(("worse", "status"), [(Agreement.fail, Status.FAILED), (Agreement.leave, Status.LEAVING)])
def test_a_cancellation_hides_nothing_worse(worse: Callable[[Agreement], None], status: Status) -> None:
    """A rank that has failed or leaves goes on saying so."""
    agreement = serving()
    worse(agreement)
    agreement.cancel()
    assert agreement.ballot().status is status


def test_no_update_no_cancellation() -> None:
    """What has not begun, or has ended, cannot be cancelled."""
    agreement = Agreement()
    agreement.cancel()
    assert agreement.ballot().status is Status.OK


def test_a_failure_ends_the_update() -> None:
    """Nothing more is decided, not even in that round."""
    agreement = serving()
    agreement.receive([ONE_STAGED, ONE_STAGED])
    failed = [replace(ONE_STAGED, fence=2), replace(ONE_STAGED, fence=2, status=Status.FAILED)]
    assert agreement.receive(failed) == Verdict(over=True, failed=(1,))


def test_a_failure_revokes_nothing() -> None:
    """What was decided before is committed on every rank."""
    agreement = serving()
    decided(agreement, 2, 2)
    agreement.receive([READY, replace(READY, status=Status.FAILED)])
    assert passed(agreement, 2) == [None, Decision(2, 1, 0)]


def test_a_broken_rank_says_failed_after_the_end() -> None:
    """Whatever the others begin cannot go well."""
    agreement = serving()
    agreement.end(broken=True)
    assert agreement.ballot().status is Status.FAILED


def test_a_rank_that_leaves_ends_the_update() -> None:
    """No round follows; what was decided before is still committed."""
    agreement = serving()
    decided(agreement, 2, 2)
    assert agreement.receive([READY, replace(READY, status=Status.LEAVING)]).gone == (1,)
    assert agreement.update.over
    assert passed(agreement, 2) == [None, Decision(2, 1, 0)]


def test_leaving_between_updates_is_no_end() -> None:
    """There is nothing to be over."""
    assert Agreement().receive([READY, replace(READY, status=Status.LEAVING)]) == Verdict(gone=(1,))


# Ranks that do not agree


def test_a_round_waits_for_all_to_begin() -> None:
    """It does not count before, and says for whom it waits."""
    agreement = Agreement()
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    assert agreement.receive([replace(ONE_STAGED, generation=0), ONE_STAGED]) == Verdict(waiting_for=(0,))
    assert not agreement.update.begun


@pytest.mark.parametrize(("own", "other"), [(1, 2), (2, 0)])
def test_ranks_that_are_updates_apart_are_refused(own: int, other: int) -> None:
    """A rank that has begun more updates than this one, or two fewer, has made or missed one."""
    agreement = Agreement()
    for _ in range(own):
        agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    with pytest.raises(GenerationMismatch) as caught:
        agreement.receive([replace(READY, generation=own), replace(READY, generation=other)])
    assert caught.value.generations == (own, other)


@pytest.mark.parametrize("ready", [Agreement(), serving(total=0)])
def test_a_rank_without_an_update_lets_others_begin(ready: Agreement) -> None:
    """It takes part in their rounds, which do not count for it."""
    verdict = ready.receive([READY, replace(ONE_STAGED, generation=2)])
    assert (verdict.agreed, verdict.waiting_for, verdict.failed) == (0, (), ())


def test_counts_of_the_last_update_do_not_count() -> None:
    """A rank that has not begun this update has staged nothing of it."""
    agreement = serving(total=1)
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=1, window=1)
    ballots = [replace(READY, generation=2, staged=1, finished=1), replace(READY, staged=1, finished=1)]
    assert agreement.receive(ballots) == Verdict(waiting_for=(1,))


@pytest.mark.parametrize(("digests", "ranks"), [((7, 8, 7), (1,)), ((8, 7, 7), (0,)), ((7, 8), (1,))])
def test_other_inputs_are_refused(digests: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """The error names the ranks that differ from most; from the first, if as many are of either kind."""
    agreement = Agreement()
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    with pytest.raises(PlacementDisagreement) as caught:
        agreement.receive([replace(READY, digest=digest) for digest in digests])
    assert caught.value.ranks == ranks


@pytest.mark.parametrize(("skew", "refused"), [(10, False), (11, True)])
def test_steps_too_far_apart_are_refused(skew: int, *, refused: bool) -> None:
    """Ranks are at most so far apart as forward passes can be queued."""
    agreement = Agreement(max_step_skew=10)
    agreement.begin(Mode.SERVING, digest=7, total=4, window=2)
    ballots = [replace(READY, step=5), replace(READY, step=5 + skew)]
    assert _is_refused(agreement, ballots) is refused


def test_steps_do_not_matter_where_nobody_serves() -> None:
    """The exclusive mode needs no steps, so ranks need not have made the same."""
    assert not _is_refused(exclusive(), [READY, replace(READY, step=5000)])


def test_standing_ranks_may_have_gone_on_since() -> None:
    """One ballot was given before the last steps, the other after them, and both ranks stood."""
    ballots = [replace(READY, step=5, standing=1), replace(READY, step=8, standing=1)]
    assert not _is_refused(serving(), ballots)


@pytest.mark.parametrize("rounds", [((0, 1), (1, 1)), ((1, 1), (0, 1))])
def test_a_rank_that_makes_steps_may_be_behind(rounds: tuple[tuple[int, int], ...]) -> None:
    """It will come to where the other stands."""
    agreement = serving()
    ballots = [[replace(READY, step=5, standing=one), replace(READY, step=8, standing=two)] for one, two in rounds]
    assert not any(_is_refused(agreement, each) for each in ballots)


def test_standing_ranks_at_different_steps_are_refused() -> None:
    """A rank that still has not come to where another stood in the round before never will."""
    agreement = serving()
    ballots = [replace(READY, step=5, standing=1), replace(READY, step=8, standing=1)]
    agreement.receive(ballots)
    with pytest.raises(StepMismatch) as caught:
        agreement.receive(ballots)
    assert caught.value.steps == (5, 8)


def _is_refused(agreement: Agreement, ballots: Sequence[Ballot]) -> bool:
    try:
        agreement.receive(ballots)
    except StepMismatch:
        return True
    return False


# Leads


def test_a_wait_doubles_the_lead() -> None:
    """Up to a limit, for a layer waits as long."""
    agreement, leads = Agreement(lead=3), []
    for _ in range(6):
        agreement.lead.waited()
        leads.append(agreement.lead.boundaries)
    assert leads == [6, 12, 24, 48, MAX_LEAD, MAX_LEAD]


def test_decisions_without_a_wait_halve_the_lead() -> None:
    """But not below what it was at first."""
    agreement = serving(total=1000, lead=5)
    for _ in range(2):
        agreement.lead.waited()
    leads = []
    for staged in range(1, 3 * 64 + 1):
        decided(agreement, 2, 2, staged=staged)
        leads.append(agreement.lead.boundaries)
    assert leads == [20] * 63 + [10] * 64 + [5] * 65


def test_a_wait_starts_the_count_again() -> None:
    """The lead is halved after 64 decisions in a row."""
    agreement = serving(total=1000, lead=8)
    for staged in range(1, 64):
        decided(agreement, 2, 2, staged=staged)
    agreement.lead.waited()
    decided(agreement, 2, 2, staged=64)
    assert agreement.lead.boundaries == 16


# Rounds


@pytest.mark.parametrize(
    ("change", "eager"),
    [
        ({}, False),
        ({"staged": 1}, True),
        ({"finished": 1}, False),
        ({"finished": 4}, True),
        ({"parts": (1,)}, False),
        ({"parts": (1,), "launch_rule": LaunchRule.ORDERED}, True),
        ({"status": Status.CANCEL}, True),
        ({"status": Status.FAILED}, True),
        ({"status": Status.LEAVING, "running": False}, True),
        ({"begun": False}, True),
        ({"standing": True}, False),
        ({"standing": True, "decisions": (Decision(2, 1, 0),)}, True),
        ({"standing": True, "decisions": (Decision(2, 1, 0),), "over": True}, True),
        ({"running": False, "staged": 1}, False),
    ],
)
def test_a_rank_with_news_joins_at_once(change: dict[str, object], *, eager: bool) -> None:
    """Others pause first: a round is worth it when the slowest rank has something to say."""
    agreement = serving()
    for name, value in change.items():
        parts = (agreement, agreement.update, agreement.boundaries)
        setattr(next(part for part in parts if hasattr(part, name)), name, value)
    assert agreement.is_eager() is eager


def test_a_rank_with_a_fence_to_give_joins_at_once() -> None:
    """The others are about to promise something too."""
    agreement = serving()
    agreement.update.staged = 1
    agreement.receive([ONE_STAGED, ONE_STAGED])
    assert agreement.is_eager()


def test_the_next_update_starts_from_nothing() -> None:
    """Only the number of the update, the steps and the lead go on."""
    agreement = serving(lead=5)
    decided(agreement, 1, 1)
    passed(agreement, 2)
    agreement.end(broken=False)
    agreement.begin(Mode.SERVING, digest=9, total=3, window=1)
    ballot = replace(READY, generation=2, digest=9, step=2)
    assert (agreement.ballot(), agreement.update.agreed, agreement.update.limit, agreement.lead.boundaries) == (
        ballot,
        0,
        3,
        5,
    )


BALLOTS = st.builds(
    Ballot,
    generation=st.just(1),
    digest=st.just(7),
    staged=st.integers(0, 4),
    launchable=st.integers(0, 4),
    finished=st.integers(0, 4),
    fence=st.integers(0, 9),
    status=st.sampled_from(Status),
    step=st.integers(0, 9),
    standing=st.integers(0, 1),
)


@given(st.lists(BALLOTS, min_size=2, max_size=4), st.randoms(use_true_random=False), st.sampled_from(Mode))
def test_the_order_of_ranks_decides_nothing(ballots: list[Ballot], random: Random, mode: Mode) -> None:
    """It shows in the names of ranks only, so a search need not tell ranks apart."""
    shuffled = random.sample(ballots, len(ballots))
    ends = []
    for order in (ballots, shuffled):
        agreement = Agreement(launch_rule=LaunchRule.ORDERED)
        agreement.begin(mode, digest=7, total=4, window=2)
        verdict = agreement.receive(order)
        ends.append((vars(agreement), replace(verdict, cancelled=(), failed=(), gone=())))
    assert ends[0] == ends[1]


@given(BALLOTS)
def test_a_ballot_survives_the_wire(ballot: Ballot) -> None:
    """A row is as long as it says, and gives back the ballot."""
    row = ballot.to_row()
    assert len(row) == Ballot.size()
    assert Ballot.from_row(row) == ballot


@pytest.mark.parametrize(
    "row", [(), (1,) * 9, (1,) * 11, (1, 7, 0, 0, 0, 0, 4, 0, 0, 0), (1, 7, 0, 0, 0, 0, -1, 0, 0, 0)]
)
def test_what_is_no_ballot_is_refused(row: tuple[int, ...]) -> None:
    """Too few numbers, too many, or a status that there is not."""
    with pytest.raises(ValueError, match=r"a rank's ballot is"):
        Ballot.from_row(row)


def test_repr_tells_where_it_stands() -> None:
    """All that is needed to understand a wait."""
    agreement = serving(total=4)
    decided(agreement, 2, 2)
    assert repr(agreement) == ("<Agreement generation 1: 0 staged, 1 agreed, 0 finished of 4, OK, step 0, fence 0>")
