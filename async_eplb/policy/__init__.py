"""Policies: from a load to a placement, as pure functions; what they balance, and whether a rebalance pays."""

from async_eplb.events.schema import Reason
from async_eplb.policy.base import PlacementPolicy
from async_eplb.policy.check import require_policy_output
from async_eplb.policy.choose import RebalanceDecision, RebalanceTerms, choose
from async_eplb.policy.global_replan import Global
from async_eplb.policy.hierarchical import Hierarchical
from async_eplb.policy.incremental import Incremental
from async_eplb.policy.measure import balancedness, rank_costs, receives
from async_eplb.policy.objective import Objective, activated_experts, tokens

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
    "rank_costs",
    "receives",
    "require_policy_output",
    "tokens",
]
