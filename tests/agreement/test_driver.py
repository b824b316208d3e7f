"""What is decided under the driver's lock is decided once."""

import pytest

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import Driver
from async_eplb.errors import EplbError


def driver_with_a_layer_due() -> Driver:
    """Return the only rank's driver, with a layer that is committed at the next boundary."""
    driver = Driver(Agreement(lead=1), ring=lambda: None)
    driver.begin(Mode.SERVING, digest=1, total=1, window=1, failed=False)
    driver.offer(1)
    driver.advance(staged=1)
    for _ in range(2):
        driver.receive([driver.ballot()])
    assert driver.agreed == 1
    return driver


def test_a_rank_is_held_before_a_layer_or_copies_it() -> None:
    """Who comes first has it: a boundary that was passed is too late to hold before."""
    error = EplbError("no step")
    driver = driver_with_a_layer_due()
    assert driver.try_pass(None) == (True, Decision(boundary=1, committed=1, launched=0))
    assert not driver.hold_before(0, error)
    assert driver.try_pass(None) == (True, None)
    driver = driver_with_a_layer_due()
    assert driver.hold_before(0, error)
    with pytest.raises(EplbError, match="no step"):
        driver.try_pass(None)
    assert driver.step == 0


def test_nothing_is_due_while_standing_on_a_held_rank() -> None:
    """As at a step."""
    driver = driver_with_a_layer_due()
    driver.stand(standing=True)
    assert driver.hold_before(0, EplbError("no step"))
    assert driver.due_while_standing(for_good=False) is None
    driver = driver_with_a_layer_due()
    driver.stand(standing=True)
    assert driver.due_while_standing(for_good=False) is not None
    assert not driver.hold_before(0, EplbError("no step"))


def test_taken_layers_are_of_one_update() -> None:
    """The next update's first layer is not taken yet."""
    driver = driver_with_a_layer_due()
    driver.try_pass(None)
    driver.end(broken=False)
    driver.begin(Mode.SERVING, digest=1, total=1, window=1, failed=False)
    assert driver.hold_before(0, EplbError("no step"))
