"""Move the expert weights of a Mixture-of-Experts model between GPUs while it serves."""

from async_eplb.errors import EplbError
from async_eplb.event_logger import EventLogger
from async_eplb.events import LayerCommitted
from async_eplb.expert_map import ExpertMap
from async_eplb.json_log import configure_json_logging
from async_eplb.load import ExpertLoad, LoadWindow
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import LayerPlan, Planner, SlotSource, plan_layer, plan_update, relabel
from async_eplb.recovery import Recovery
from async_eplb.sync import SyncUpdater
from async_eplb.topology import EPTopology
from async_eplb.transport import (
    CopyEngineTransport,
    HybridTransport,
    MemoryTransport,
    NcclOptions,
    TorchDistTransport,
    Transport,
)
from async_eplb.updater import ExpertUpdater, UpdateHandle, UpdaterStatistics, UpdateSummary
from async_eplb.weight_source import SafetensorsSource, WeightSource
from async_eplb.weights import ExpertWeights

__version__ = "0.1.0"

__all__ = [
    "CopyEngineTransport",
    "EPTopology",
    "EplbError",
    "EventLogger",
    "ExpertLoad",
    "ExpertMap",
    "ExpertPlacement",
    "ExpertUpdater",
    "ExpertWeights",
    "HybridTransport",
    "LayerCommitted",
    "LayerPlan",
    "LoadWindow",
    "MemoryTransport",
    "NcclOptions",
    "Planner",
    "Recovery",
    "SafetensorsSource",
    "SlotSource",
    "SyncUpdater",
    "TorchDistTransport",
    "Transport",
    "UpdateHandle",
    "UpdateOptions",
    "UpdateSummary",
    "UpdaterStatistics",
    "WeightSource",
    "configure_json_logging",
    "plan_layer",
    "plan_update",
    "relabel",
]
