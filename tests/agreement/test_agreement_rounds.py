"""Ballots that are refused, leads, and when a rank joins a round: the rules of the agreement, one by one."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agreements import ONE_STAGED, READY, decided, exclusive, passed, serving

from async_eplb.agreement.ballot import Ballot, Decision, Status, Verdict
from async_eplb.agreement.lead import MAX_LEAD
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import GenerationMismatch, PlacementDisagreement, StepMismatch

# Ranks that do not agree


def test_a_round_waits_for_all_to_begin() -> None:
    """It does not count before, and names the ranks that it waits for."""
    agreement = Agreement()
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    assert agreement.receive([replace(ONE_STAGED, generation=0), ONE_STAGED]) == Verdict(waiting_for=(0,))
    assert not agreement.update.begun


def test_a_rank_whose_peer_has_begun_a_later_update_is_refused() -> None:
    """This update is over there, and the next one that begins here is the peer's."""
    agreement = Agreement()
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    with pytest.raises(GenerationMismatch) as caught:
        agreement.receive([READY, replace(READY, generation=3)])
    assert caught.value.generations == (1, 3)
    agreement.end(failed=True)
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    assert agreement.generation == 3


def test_a_rank_that_has_missed_an_update_begins_the_one_after() -> None:
    """A peer has given it up before it has begun here; who still waits for it is told so."""
    late, waiting = Agreement(), Agreement()
    waiting.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    round_ = [READY, replace(READY, status=Status.GIVEN_UP), replace(READY, generation=0)]
    assert waiting.receive(round_) == Verdict(waiting_for=(2,), failed=(1,), over=True)
    late.receive(round_)
    late.begin(Mode.EXCLUSIVE, digest=7, total=4, window=2)
    assert late.generation == 2


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
    """One ballot was given before the last steps, the other after them, and both ranks were idle."""
    ballots = [replace(READY, step=5, standing=1), replace(READY, step=8, standing=1)]
    assert not _is_refused(serving(), ballots)


@pytest.mark.parametrize("rounds", [((0, 1), (1, 1)), ((1, 1), (0, 1))])
def test_a_rank_that_makes_steps_may_be_behind(rounds: tuple[tuple[int, int], ...]) -> None:
    """It will reach the boundary of the other."""
    agreement = serving()
    ballots = [[replace(READY, step=5, standing=one), replace(READY, step=8, standing=two)] for one, two in rounds]
    assert not any(_is_refused(agreement, each) for each in ballots)


def test_standing_ranks_at_different_steps_are_refused() -> None:
    """A rank that has not reached the boundary at which another was idle a round ago never will."""
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
    """Others pause first: a round is worth it when the slowest rank has news."""
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
    agreement.end(failed=False)
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
    """It shows in the names of ranks only, so a search need not distinguish ranks."""
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
    """A row has the documented length, and gives back the ballot."""
    row = ballot.to_row()
    assert len(row) == Ballot.size()
    assert Ballot.from_row(row) == ballot


@pytest.mark.parametrize(
    "row", [(), (1,) * 9, (1,) * 11, (1, 7, 0, 0, 0, 0, 6, 0, 0, 0), (1, 7, 0, 0, 0, 0, -1, 0, 0, 0)]
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
