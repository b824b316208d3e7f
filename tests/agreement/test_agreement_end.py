"""How cancellations, failures and ranks that leave end an update: the rules of the agreement, one by one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.agreements import ONE_STAGED, READY, decided, exclusive, passed, serving

from async_eplb.agreement.ballot import Decision, Status, Verdict
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode


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
    """The round of the cancellation itself grants nothing."""
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
    """An update that has not begun, or has ended, cannot be cancelled."""
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
    """Layers decided before are committed on every rank."""
    agreement = serving()
    decided(agreement, 2, 2)
    agreement.receive([READY, replace(READY, status=Status.FAILED)])
    assert passed(agreement, 2) == [None, Decision(2, 1, 0)]


def test_a_broken_rank_says_failed_after_the_end() -> None:
    """No update that the others begin can succeed."""
    agreement = serving()
    agreement.end(failed=True)
    assert agreement.ballot().status is Status.GIVEN_UP


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
