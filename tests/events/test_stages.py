"""The lists of stages and of byte keys name what events hold."""

import re

import pytest

from async_eplb.events.schema import LINK_NBYTES, LayerTransferred, UpdateFinished, UpdateStalled, field_names
from async_eplb.events.stages import FENCE, STAGES, WATCHED, Stage


@pytest.mark.parametrize("stage", [*STAGES, FENCE], ids=lambda stage: stage.name)
def test_a_stage_names_keys_of_its_event(stage: Stage) -> None:
    """Its time, its number, and what follows it."""
    keys = {stage.duration, stage.counted_by, stage.followed_by} - {""}
    assert keys <= set(field_names(stage.event))


def test_an_update_ends_with_the_total_of_every_stage() -> None:
    """``plan_ms`` and so on, in order."""
    keys = [name for name in field_names(UpdateFinished) if name in {stage.total for stage in STAGES}]
    assert keys == [stage.total for stage in STAGES]


@pytest.mark.parametrize("event", [LayerTransferred, UpdateFinished])
def test_bytes_are_listed_by_direction_and_link(event: type) -> None:
    """All such keys of an event, in order; each is made of its labels."""
    form = re.compile(r"(sent|received)_nbytes_(within|across)_nodes?")
    assert list(filter(form.fullmatch, field_names(event))) == list(LINK_NBYTES)
    assert all(key == f"{direction}_nbytes_{link}" for key, (direction, link) in LINK_NBYTES.items())


def test_the_schema_lists_what_can_stall() -> None:
    """The stages that the watchdog can find."""
    (meaning,) = UpdateStalled.__annotations__["stage"].__metadata__
    assert tuple(re.findall(r"`(\w+)`", meaning)) == WATCHED
