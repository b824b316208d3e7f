"""Make a failing scenario smaller as long as it still fails. Pure, except for the function that runs scenarios."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from async_eplb.agreement.rules import LaunchRule
from async_eplb.fuzz.scenario import Scenario, Traffic, Tuning

_OTHER_SEEDS = 3
"""Other seeds that are tried for each smaller scenario, since events have another order in it."""
_SEED_STRIDE = 1_000_003


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool], *, max_runs: int = 400) -> Scenario:
    """Return a smaller scenario that fails too, and from which no single thing can be taken away.

    :param fails: runs a scenario; whether it fails in the same way
    :param max_runs: most calls of ``fails``; the smallest scenario so far is returned then
    """
    runs = 0
    found = True
    while found:
        found = False
        for smaller in _smaller(scenario):
            for other in range(1 + _OTHER_SEEDS):
                if runs >= max_runs:
                    return scenario
                runs += 1
                candidate = replace(smaller, seed=smaller.seed + other * _SEED_STRIDE)
                if fails(candidate):
                    scenario, found = candidate, True
                    break
            if found:
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Yield scenarios with one thing less, those that take away most first."""
    for number in range(len(scenario.troubles)):
        yield replace(scenario, troubles=scenario.troubles[:number] + scenario.troubles[number + 1 :])
    if scenario.num_updates > 1:
        yield replace(scenario, num_updates=1)
    if scenario.num_ranks > 2:  # noqa: PLR2004 - a world has two ranks at least
        yield _with_ranks(scenario, scenario.num_ranks - 1)
    if scenario.num_layers > 2:  # noqa: PLR2004 - and two layers
        layers = scenario.num_layers - 1
        troubles = tuple(replace(trouble, layer=min(trouble.layer, layers - 1)) for trouble in scenario.troubles)
        yield replace(scenario, num_layers=layers, troubles=troubles)
    yield from _plainer(scenario)
    if scenario.launch_rule is not LaunchRule.AT_ONCE:
        yield replace(scenario, launch_rule=LaunchRule.AT_ONCE)
    if scenario.serving:
        yield replace(scenario, serving=False)
    if scenario.tuning.verify != "off":
        yield replace(scenario, tuning=replace(scenario.tuning, verify="off"))


def _plainer(scenario: Scenario) -> Iterator[Scenario]:
    """Yield scenarios with one value as it is by default."""
    for option in ("sources", "operations_per_group"):
        plain = getattr(Tuning(), option)
        if getattr(scenario.tuning, option) != plain:
            yield replace(scenario, tuning=replace(scenario.tuning, **{option: plain}))
    for option in ("idle_every", "pause_after", "numbered"):
        plain = getattr(Traffic(), option)
        if getattr(scenario.traffic, option) != plain:
            yield replace(scenario, traffic=replace(scenario.traffic, **{option: plain}))
    for option in ("goes_on", "reorder", "by_policy", "num_nodes"):
        plain = getattr(Scenario(scenario.seed), option)
        if getattr(scenario, option) != plain:
            yield replace(scenario, **{option: plain})


def _with_ranks(scenario: Scenario, num_ranks: int) -> Scenario:
    return replace(
        scenario,
        num_ranks=num_ranks,
        num_nodes=1,
        num_experts=min(scenario.num_experts, num_ranks * scenario.num_slots),
        troubles=tuple(
            replace(trouble, rank=trouble.rank % num_ranks, peer=(trouble.rank + 1) % num_ranks)
            for trouble in scenario.troubles
        ),
    )
