"""Numbers and choices of users: equal ones of any type are taken alike, and everything else is refused by name."""

import math
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_eplb import (
    EPTopology,
    ExpertLoad,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    Hierarchical,
    Incremental,
    LoadWindow,
    RebalanceOptions,
    RebalanceTerms,
    UpdateOptions,
    plan_update,
)
from async_eplb.arguments import DEADLINE_S, Flag, Kind, OneOf, OrNone, Real, SetOf, Whole, take
from async_eplb.errors import EplbError, InvalidOptions, InvalidPlacement, InvalidTopology
from async_eplb.fuzz import Mishap, Scenario, Trouble, Tuning, scenario_for
from async_eplb.fuzz.scenario import Traffic
from async_eplb.plan import Planner, plan_layer
from async_eplb.simulate import CLUSTERS, MODELS, Cluster, Link, Model, UpdateCase
from async_eplb.transport import MemoryTransport
from async_eplb.transport.torch_dist.nccl import NcclOptions

QUICK = settings(max_examples=100, derandomize=True, deadline=None)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


class Number(IntEnum):
    """Numbers by name."""

    EIGHT = 8


class Unprintable:
    """Has no text."""

    def __repr__(self) -> str:
        raise RuntimeError


NO_NUMBERS: list[Any] = [
    *("8", b"8", "", [8], (8,), {8}, {}, object(), Unprintable(), len, int),
    *(True, False, np.bool_(1), np.array(True), torch.tensor(True)),  # noqa: FBT003 - what is tried
    *(8j, Decimal(8), np.str_("8"), np.datetime64("2026-01-01"), np.timedelta64(8, "s"), torch.float32),
    *(np.array([8]), np.arange(0), torch.tensor([8]), torch.tensor([[8.0]]), torch.empty((), device="meta")),
    *(math.nan, np.float32("nan"), torch.tensor(math.nan), -math.inf, -1, -1.5, np.int8(-1), torch.tensor(-8)),
]
"""What neither a whole number nor any other of at least 0 is."""
NO_FLAGS: list[Any] = [None, 0, 1, 1.0, "True", np.int8(1), torch.tensor(1), np.array([True]), torch.tensor([True])]

NOT_WHOLE: list[Any] = [8.0, 288 / 8, 8.5, np.float64(8), np.float16(8), torch.tensor(8.0), Fraction(8), math.inf]


def forms_of(number: int) -> list[Any]:
    """Return a whole number as every type that has it."""
    fitting = [dtype(number) for dtype in INTEGERS if np.iinfo(dtype).min <= number <= np.iinfo(dtype).max]
    arrays = [np.array(each) for each in fitting]
    return [number, *fitting, *arrays, *(torch.from_numpy(array) for array in arrays)]


@QUICK
@given(st.integers(-(2**63), 2**64 - 1))
def test_whole_numbers_of_every_type_are_the_same_int(number: int) -> None:
    """Python's, numpy's and torch's, with and without a sign."""
    for form in forms_of(number):
        taken = take(form, Whole(-(2**63)), "size", InvalidOptions)
        assert (taken, type(taken)) == (number, int), repr(form)


def test_several_numbers_of_every_type_are_a_set() -> None:
    """From any order, with any repetition, once."""
    for form in ([2, 1, 2], (np.int8(1), torch.tensor(2)), np.array([2, 1]), torch.tensor([1, 2]), iter([1, 2])):
        assert take(form, SetOf(Whole(1)), "rows", InvalidOptions) == {1, 2}


def test_an_enum_of_numbers_is_its_number() -> None:
    """So it is written as one."""
    assert type(take(Number.EIGHT, Whole(1), "size", InvalidOptions)) is int


@QUICK
@given(st.floats(0, 1e300) | st.floats(0, 1e4, width=16) | st.integers(0, 2**53))
def test_numbers_of_every_type_are_the_same_float(number: float) -> None:
    """A whole one as well, which is no other value than its float."""
    for form in (number, np.float64(number), np.array(number), torch.tensor(number, dtype=torch.float64)):
        taken = take(form, Real(), "time", InvalidOptions)
        assert (taken, type(taken)) == (number, float)
    with np.errstate(over="ignore"):
        for small in (np.float16(number), np.float32(number)):
            assert take(small, Real(0, math.inf), "time", InvalidOptions) == float(small)


@pytest.mark.parametrize(
    "kind", [Whole(0), Whole(0, 99), Real(), Real(0, math.inf), DEADLINE_S, OrNone(Real())], ids=str
)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_by_name(value: object, kind: Kind[object]) -> None:
    """With what it must be, in one short line."""
    with pytest.raises(InvalidOptions, match=r"^size is .{1,80}; it must be ") as caught:
        take(value, kind, "size", InvalidOptions)
    assert caught.value.option == "size"


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_floats_are_no_whole_numbers(value: object) -> None:
    """Even if they are whole: ``//`` divides slots over ranks, ``/`` does not."""
    with pytest.raises(InvalidOptions, match="it must be a whole number of at least 1"):
        take(value, Whole(1), "size", InvalidOptions)


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (Whole(1), [1, 10**400], [0, None]),
        (Whole(2, 4), [2, 4], [1, 5]),
        (Real(), [0, 1e308, Fraction(1, 4)], [math.inf, 10**400]),
        (Real(0, math.inf), [0, math.inf], [10**400]),
        (Real(1), [1, 1.5], [math.nextafter(1, 0)]),
        (Real(0, 5, above=True), [5e-324, 5], [0, -0.0, 5.1]),
        (DEADLINE_S, [1e-9, 1e9], [0, 1e10, math.inf]),
        (OrNone(Whole(1)), [None, 1], [0]),
        (SetOf(Whole(1)), [frozenset(), {1, 2}], [1, None, [0], "12", [[1]], [True], torch.tensor(1)]),
        (Flag(), [True, False, np.bool_(1)], [None, 0, 1, "no", np.array([True])]),
        (OneOf(("on", "off")), ["on", np.str_("off")], ["", "o", None, ["on"], np.array(["on", "on"])]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_limits(kind: Kind[object], taken: list[object], refused: list[object]) -> None:
    """What is at a limit is taken, what is beyond is not."""
    for value in taken:
        assert take(value, kind, "size", InvalidOptions) == value
    for value in refused:
        with pytest.raises(InvalidOptions):
            take(value, kind, "size", InvalidOptions)


TERMS = RebalanceTerms(expert_nbytes=8, link_bytes_per_s=8, layer_step_s=8, horizon_steps=8)
EXAMPLES: list[Any] = [
    EPTopology(8, 8, 8),
    UpdateOptions(max_replicas=8),
    NcclOptions(),
    Planner(),
    RebalanceOptions(every_steps=8, max_nbytes_per_step=8),
    TERMS,
    Hierarchical(8),
    Incremental(8, num_groups=8),
    ExpertLoad.from_counts([[8]]),
    Link(8, 8),
    Cluster(8, Link(8, 8), Link(8, 8), 8, ""),
    Model(8, 8, 8, 8, 8, 8, ""),
    UpdateCase(MODELS["gpt-oss-120b"], CLUSTERS["h100"], EPTopology(8, 1, 32), num_layers=8),
    Scenario(8),
    Tuning(),
    Traffic(),
    Trouble(Mishap.DELAY, 8),
]
NUMBERS = [
    pytest.param(example, field.name, id=f"{type(example).__name__}.{field.name}")
    for example in EXAMPLES
    for field in fields(example)
    if isinstance(getattr(example, field.name), int | float)
]


def remade(example: Any, **values: Any) -> Any:
    """Return the example with other values."""
    return type(example)(**{field.name: getattr(example, field.name) for field in fields(example)} | values)


@pytest.mark.parametrize(("example", "name"), NUMBERS)
def test_every_number_of_a_value_is_taken_or_refused(example: Any, name: str) -> None:
    """Equal values, whatever their types were; or an error of this package that names the number."""
    usual = getattr(example, name)
    array = np.array(usual)
    for form in (array[()], array, torch.from_numpy(array)):
        other = remade(example, **{name: form})
        assert (other, repr(other)) == (example, repr(example))
        assert type(getattr(other, name)) is type(usual)
    for value in NO_FLAGS if isinstance(usual, bool) else NO_NUMBERS:
        with pytest.raises(EplbError, match=f"^{name} is "):
            remade(example, **{name: value})


def _updater(**numbers: Any) -> ExpertUpdater:
    placement = ExpertPlacement.trivial(1, 1, 1)
    weights = ExpertWeights({0: [torch.zeros(1, 1)]})
    return ExpertUpdater(weights, placement, EPTopology(1, 1, 1), transport=MemoryTransport.world(1)[0], **numbers)


PLACEMENT = ExpertPlacement.trivial(2, 16, 8)
GROUP = EPTopology(8, 8, 2)
CALLS: list[tuple[Callable[..., object], dict[str, int], type[EplbError]]] = [
    (EPTopology.for_physical_experts, {"num_physical_experts": 8, "num_ranks": 8, "num_nodes": 8}, InvalidTopology),
    (ExpertPlacement.trivial, {"num_layers": 8, "num_physical_experts": 8, "num_logical_experts": 8}, InvalidPlacement),
    (partial(ExpertPlacement.from_mapping, [[0]]), {"num_logical_experts": 8}, InvalidPlacement),
    (partial(ExpertPlacement, np.array([[0]])), {"num_logical_experts": 8}, InvalidPlacement),
    (
        partial(UpdateCase.topology_for, MODELS["gpt-oss-120b"], CLUSTERS["h100"]),
        {"num_ranks": 8, "num_nodes": 8},
        InvalidTopology,
    ),
    (scenario_for, {"seed": 8}, InvalidOptions),
    (
        lambda **numbers: LoadWindow(**numbers).num_steps(),
        {"num_layers": 8, "num_logical_experts": 8, "window_steps": 8},
        InvalidOptions,
    ),
    (lambda rank: list(plan_update(PLACEMENT, PLACEMENT, GROUP, rank)), {"rank": 7}, InvalidOptions),
    (lambda rank: plan_layer([0, 1], [1, 0], EPTopology(2, 1, 1), rank), {"rank": 1}, InvalidOptions),
    (lambda **numbers: _updater(**numbers).rank, {"rank": 0}, InvalidOptions),
]


@pytest.mark.parametrize(
    ("call", "usual", "error", "name"),
    [(call, usual, error, name) for call, usual, error in CALLS for name in usual],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_number_of_a_call_is_taken_or_refused(
    call: Callable[..., object], usual: dict[str, int], error: type[EplbError], name: str
) -> None:
    """As those of values are."""
    for form in forms_of(usual[name]):
        assert call(**usual | {name: form}) == call(**usual)
    for value in [*NO_NUMBERS, *NOT_WHOLE]:
        with pytest.raises(error, match=f"^{name} is "):
            call(**usual | {name: value})
