"""Decisions whether a rebalance pays."""

import pytest

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.errors import InvalidLoad, InvalidOptions, InvalidPlacement, UnplacedExpert
from async_eplb.load.value import ExpertLoad
from async_eplb.policy import Reason, RebalanceDecision, RebalanceTerms, choose

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
CURRENT = ExpertPlacement.from_mapping([[0, 1, 2, 3]] * 3)
CANDIDATE = ExpertPlacement.from_mapping([[0, 2, 1, 3]] * 3)
LOAD = ExpertLoad.from_counts([[4, 4, 0, 0], [4, 0, 4, 0], [4, 0, 4, 0]])
"""With the candidate, the first layer gets twice as fast; the others get slower, or are balanced already."""


def decide(
    load: ExpertLoad = LOAD,
    candidate: ExpertPlacement = CANDIDATE,
    *,
    horizon_steps: int = 100,
    slowdown: float = 1.0,
    min_payback: float = 1.0,
    balanced_at: float = 0.98,
) -> RebalanceDecision:
    """Decide where the most loaded rank computes 2 s a step, and a rank receives an expert in 4 s."""
    terms = RebalanceTerms(
        expert_nbytes=1000,
        link_bytes_per_s=250.0,
        layer_step_s=2.0,
        horizon_steps=horizon_steps,
        slowdown=slowdown,
        min_payback=min_payback,
        balanced_at=balanced_at,
    )
    return choose(load, CURRENT, candidate, TOPOLOGY, terms)


def test_the_estimate() -> None:
    """One layer's step is halved, and each rank receives one expert for it."""
    assert decide() == RebalanceDecision(
        placement=CURRENT.with_layers(CANDIDATE, (0,)),
        reason=Reason.PAYS,
        layers=(0,),
        balancedness_before=(0.5, 1.0, 1.0),
        balancedness_after=(1.0, 1.0, 1.0),
        num_receives=2,
        num_slots=4,
        received_nbytes=2000,
        transfer_s=4.0,
        saved_s_per_step=1.0,
        horizon_steps=100,
    )


@pytest.mark.parametrize(
    ("horizon_steps", "slowdown", "min_payback", "pays"),
    [(5, 1.0, 1.0, True), (4, 1.0, 1.0, False), (4, 0.5, 1.0, True), (8, 1.0, 2.0, False), (1, 0.0, 1.0, True)],
)
def test_a_rebalance_pays_if_it_saves_more_than_it_costs(
    horizon_steps: int,
    slowdown: float,
    min_payback: float,
    pays: bool,  # noqa: FBT001
) -> None:
    """1 s is saved in each step of the horizon; 4 s of transfers, weighed by the slowdown, have to be paid back."""
    decision = decide(horizon_steps=horizon_steps, slowdown=slowdown, min_payback=min_payback)
    assert decision.pays == pays
    assert decision.reason is (Reason.PAYS if pays else Reason.DOES_NOT_PAY)
    assert (decision.placement == CURRENT) != pays
    assert decision.layers == (0,)


def test_balanced_layers_stay() -> None:
    """Nothing moves if every layer is above the threshold."""
    decision = decide(balanced_at=0.5)
    assert (decision.reason, decision.layers, decision.placement) == (Reason.BALANCED, (), CURRENT)


def test_layers_that_the_candidate_does_not_improve_stay() -> None:
    """Neither one that gets worse, nor one that is as bad as before."""
    load = ExpertLoad.from_counts([[4, 0, 4, 0], [4, 0, 1, 0], [8, 0, 0, 1]])
    decision = decide(load)
    assert (decision.reason, decision.layers, decision.placement) == (Reason.NO_GAIN, (), CURRENT)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("expert_nbytes", 0),
        ("link_bytes_per_s", 0.0),
        ("layer_step_s", -1.0),
        ("horizon_steps", 0),
        ("slowdown", -0.1),
        ("min_payback", float("nan")),
        ("balanced_at", float("inf")),
    ],
)
def test_impossible_terms_are_refused(option: str, value: float) -> None:
    """The error names the option."""
    terms = {"expert_nbytes": 1, "link_bytes_per_s": 1.0, "layer_step_s": 1.0, "horizon_steps": 1} | {option: value}
    with pytest.raises(InvalidOptions) as caught:
        RebalanceTerms(**terms)  # type: ignore[arg-type]
    assert caught.value.option == option


def test_what_does_not_belong_together_is_refused() -> None:
    """Loads and candidates of another model, and candidates that lack an expert."""
    with pytest.raises(InvalidLoad, match="the load has 1 layers of 4"):
        decide(ExpertLoad.from_counts([[1, 1, 1, 1]]))
    with pytest.raises(InvalidPlacement):
        decide(candidate=ExpertPlacement.trivial(2, 4, 4))
    with pytest.raises(UnplacedExpert):
        decide(candidate=ExpertPlacement.from_mapping([[0, 1, 2, 2]] * 3, 4))
