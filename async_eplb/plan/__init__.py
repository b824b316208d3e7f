"""Planning: from an old and a new placement to what each rank sends, receives and copies.

Plans are pure functions of the two placements, so that all ranks make matching ones without a message.
"""

from async_eplb.plan.layer_plan import FanOut, LayerPlan, LocalCopy, Recv, Send, SlotSource
from async_eplb.plan.planner import Planner
from async_eplb.plan.posting import PostedLayer, PostedUpdate
from async_eplb.plan.reference import Transfer, layer_transfers, plan_layer
from async_eplb.plan.relabel import relabel
from async_eplb.plan.transfers import Needs, Transfers, find_needs
from async_eplb.plan.update import UpdatePlan, plan_update, staged_slot_counts

__all__ = [
    "FanOut",
    "LayerPlan",
    "LocalCopy",
    "Needs",
    "Planner",
    "PostedLayer",
    "PostedUpdate",
    "Recv",
    "Send",
    "SlotSource",
    "Transfer",
    "Transfers",
    "UpdatePlan",
    "find_needs",
    "layer_transfers",
    "plan_layer",
    "plan_update",
    "relabel",
    "staged_slot_counts",
]
