"""From a load to a placement, pure: policies, what they balance, and whether it pays to follow them."""

from async_eplb.policy.check import require_policy_output
from async_eplb.policy.choose import Reason, RebalanceDecision, RebalanceTerms, choose
from async_eplb.policy.hierarchical import global_, hierarchical
from async_eplb.policy.incremental import incremental
from async_eplb.policy.measure import balancedness, rank_costs, receives
from async_eplb.policy.objective import Objective, activated_experts, tokens
from async_eplb.policy.policies import Global, Hierarchical, Incremental, PlacementPolicy

__all__ = [
    "Global",
    "Hierarchical",
    "Incremental",
    "Objective",
    "PlacementPolicy",
    "Reason",
    "RebalanceDecision",
    "RebalanceTerms",
    "activated_experts",
    "balancedness",
    "choose",
    "global_",
    "hierarchical",
    "incremental",
    "rank_costs",
    "receives",
    "require_policy_output",
    "tokens",
]
