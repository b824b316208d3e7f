"""Fences and decisions of the agreement, one by one; ``test_agreement_search`` shows that its rules are enough."""

from dataclasses import replace

import pytest
from support.agreement_model import copied
from support.agreements import ONE_STAGED, READY, decided, exclusive, passed, serving

from async_eplb.agreement.ballot import Decision, Status, Verdict
from async_eplb.agreement.rules import LaunchRule

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
    """Its lead and later decisions do not matter."""
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
    """No rank makes steps, so their next boundary takes the place of later ones."""
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
