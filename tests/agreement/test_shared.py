"""Decisions under the lock are made once."""

import pytest

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import EplbError


def shared_with_a_layer_due() -> SharedAgreement:
    """Return the only rank's shared, with a layer that is committed at the next boundary."""
    shared = SharedAgreement(Agreement(lead=1))
    shared.begin(Mode.SERVING, digest=1, total=1, window=1, failed=False)
    shared.offer(1)
    shared.count(staged=1)
    for _ in range(2):
        shared.receive([shared.ballot()])
    assert shared.outlook.agreed == 1
    return shared


def test_a_rank_is_held_before_a_layer_or_copies_it() -> None:
    """The first call wins: a boundary that was passed is too late to wait at."""
    error = EplbError("no step")
    shared = shared_with_a_layer_due()
    assert shared.try_pass(0) == (True, Decision(boundary=1, copied=1, parts_launched=0))
    assert not shared.hold(error, before=0)
    assert shared.try_pass(0) == (True, None)
    shared = shared_with_a_layer_due()
    assert shared.hold(error, before=0)
    with pytest.raises(EplbError, match="no step"):
        shared.try_pass(0)
    assert shared.outlook.step == 0


def test_nothing_is_due_while_standing_on_a_held_rank() -> None:
    """As at a step."""
    shared = shared_with_a_layer_due()
    shared.set_standing(standing=True)
    assert shared.hold(EplbError("no step"), before=0)
    assert shared.due_while_standing(for_good=False) is None
    shared = shared_with_a_layer_due()
    shared.set_standing(standing=True)
    assert shared.due_while_standing(for_good=False) is not None
    assert not shared.hold(EplbError("no step"), before=0)


def test_taken_layers_are_of_one_update() -> None:
    """The next update's first layer is not taken yet."""
    shared = shared_with_a_layer_due()
    shared.try_pass(0)
    shared.end(failed=False)
    shared.begin(Mode.SERVING, digest=1, total=1, window=1, failed=False)
    assert shared.hold(EplbError("no step"), before=0)
