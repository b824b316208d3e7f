"""Ways to plan the same update, each with what it costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from async_eplb.placement import ExpertPlacement
from async_eplb.plan import Planner, find_needs, relabel
from async_eplb.plan.relabel import linear_assignment
from async_eplb.simulate.cost import Floats, LayerCosts, layer_costs, lower_bounds
from async_eplb.simulate.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to plan an update.

    :param relabels: whether ranks and nodes of the new placement trade places first
    """

    planner: Planner
    relabels: bool


VARIANTS = {
    "reference": Variant(Planner("chunked"), relabels=False),
    "balanced": Variant(Planner("balanced"), relabels=False),
    "relabel": Variant(Planner("balanced"), relabels=True),
    "relay": Variant(Planner("relayed"), relabels=True),
}
"""``reference`` is what serving engines do; each of the others adds one thing."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a variant takes.

    :param relabel_ms: host time of relabelling, which is done once for all ranks or once on each
    :param plan_ms: host time of choosing all transfers, on every rank
    :param bound_s: seconds that no plan for the same placements beats, ``[layers]``
    """

    relabel_ms: float
    plan_ms: float
    costs: LayerCosts
    bound_s: Floats

    @property
    def time_s(self) -> float:
        """Seconds of all layers, one after another."""
        return float(self.costs.time_s.sum())

    @property
    def ratio(self) -> float:
        """Time over the lower bound; 1 if nothing moves."""
        bound = float(self.bound_s.sum())
        return self.time_s / bound if bound else 1.0


def simulate(
    scenario: Scenario, names: tuple[str, ...] = tuple(VARIANTS), on_variant: Callable[[str], None] = lambda _: None
) -> dict[str, Outcome]:
    """Plan the scenario's update in several ways; return what each takes, by name.

    :param names: of :data:`VARIANTS`
    :param on_variant: called with the name of each that is done
    :raises MissingExtra: if one relabels, without scipy
    """
    if any(VARIANTS[name].relabels for name in names):
        linear_assignment()  # before anything takes long, and outside of what is timed
    old, new = scenario.placements()
    relabelled: tuple[ExpertPlacement, float] | None = None
    outcomes = {}
    for name in names:
        variant = VARIANTS[name]
        if variant.relabels and relabelled is None:
            start = time.perf_counter()
            relabelled = relabel(old, new, scenario.topology), (time.perf_counter() - start) * 1e3
        target, relabel_ms = relabelled if variant.relabels and relabelled else (new, 0.0)
        outcomes[name] = _outcome(scenario, old, target, variant.planner, relabel_ms)
        on_variant(name)
    return outcomes


def _outcome(
    scenario: Scenario, old: ExpertPlacement, new: ExpertPlacement, planner: Planner, relabel_ms: float
) -> Outcome:
    topology, shape = scenario.topology, (scenario.cluster, scenario.model.expert_nbytes)
    maps = old.physical_to_logical_map, new.physical_to_logical_map
    start = time.perf_counter()
    transfers = planner.transfers(*maps, topology)
    plan_ms = (time.perf_counter() - start) * 1e3
    return Outcome(
        relabel_ms=relabel_ms,
        plan_ms=plan_ms,
        costs=layer_costs(transfers, old.num_layers, topology, *shape),
        bound_s=lower_bounds(find_needs(*maps, topology), old.num_layers, topology, *shape),
    )
