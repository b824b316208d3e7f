"""Options: which of them ranks must agree on, and in which form they compare them."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from async_eplb import UpdateOptions
from async_eplb.agreement.lead import MAX_LEAD
from async_eplb.agreement.rules import Mode
from async_eplb.errors import InvalidOptions
from async_eplb.options import canonical
from async_eplb.plan import Planner
from async_eplb.topology import EPTopology

OTHER = {
    "verify": "canary",
    "planner": Planner("balanced"),
    "staging_depth": 3,
    "reserve_nbytes": 1 << 20,
    "operations_per_group": 7,
    "open_timeout_s": 20.0,
    "transfer_timeout_s": 1.0,
    "control_timeout_s": 50.0,
    "progress_timeout_s": 200.0,
    "lead": 1,
    "max_step_skew": 5,
    "max_replicas": 9,
    "dispatch_seed": 1,
    "log_inputs": True,
    "log_decisions": True,
}


def test_what_ranks_must_agree_on() -> None:
    """Plain values by name; the planner is its fields."""
    assert UpdateOptions().wire() == {
        "verify": "off",
        "planner": {"sources": "chunked"},
        "staging_depth": 2,
        "reserve_nbytes": None,
        "operations_per_group": 256,
    }


@pytest.mark.parametrize("name", [each.name for each in fields(UpdateOptions)])
def test_what_differs_between_ranks_shows_where_they_must_agree(name: str) -> None:
    """A rank with another value has another wire form exactly for the options that are in it."""
    usual = UpdateOptions()
    other = replace(usual, **{name: OTHER[name]})  # type: ignore[arg-type]
    assert (other.wire() != usual.wire()) is (name in usual.wire())


def test_the_wire_form_is_json() -> None:
    """Equal options have equal text."""
    text = json.dumps(UpdateOptions(planner=Planner("relayed")).wire(), sort_keys=True)
    assert text == (
        '{"operations_per_group": 256, "planner": {"sources": "relayed"}, "reserve_nbytes": null, "staging_depth": 2, '
        '"verify": "off"}'
    )


def test_equal_numbers_have_one_wire_form() -> None:
    """Of options and of topologies, whatever type they were given as (rule 23)."""
    given: list[Any] = [np.uint8(7), np.array(7), torch.tensor(7, dtype=torch.int16)]
    for seven in given:
        options = UpdateOptions(staging_depth=seven, operations_per_group=seven)
        assert json.dumps(options.wire()) == json.dumps(UpdateOptions(staging_depth=7, operations_per_group=7).wire())
        assert json.dumps(canonical(EPTopology(seven, seven, seven))) == json.dumps(canonical(EPTopology(7, 7, 7)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("control_timeout_s", 30),
        ("control_timeout_s", 29.5),
        ("progress_timeout_s", 60),
        ("transfer_timeout_s", "30"),
        ("transfer_timeout_s", math.nan),
        ("open_timeout_s", True),
        ("open_timeout_s", 0),
        ("progress_timeout_s", math.inf),
        ("lead", MAX_LEAD + 1),
        ("verify", ["off"]),
        ("verify", None),
        ("planner", "balanced"),
        ("planner", None),
        ("log_inputs", "no"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    """When they are made, by name, whatever their type."""
    with pytest.raises(InvalidOptions, match=f"^{option} is ") as caught:
        UpdateOptions(**{option: value})  # type: ignore[arg-type]
    assert caught.value.option == option


@pytest.mark.parametrize("sources", ["", "Balanced", None, 1, ["balanced"]])
def test_a_planner_of_other_sources_is_refused(sources: object) -> None:
    """Whatever their type."""
    with pytest.raises(InvalidOptions, match="one of chunked, balanced, relayed"):
        Planner(sources)  # type: ignore[arg-type]


def test_canonical_values() -> None:
    """Enums are their values, dataclasses their fields; what has no form is refused."""
    assert canonical(Mode.SERVING) == "serving"
    assert canonical(EPTopology(4, 2, 3)) == {"num_ranks": 4, "num_nodes": 2, "num_local_physical_experts": 3}
    with pytest.raises(TypeError, match="has no canonical form"):
        canonical(object())
