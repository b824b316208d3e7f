"""Move the expert weights of a Mixture-of-Experts model between GPUs while it serves.

Names are looked up when they are first used: whoever only plans or chooses placements does not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from async_eplb.errors import EplbError as EplbError
    from async_eplb.events.emit import StandardLogger as StandardLogger
    from async_eplb.events.event_logger import EventLogger as EventLogger
    from async_eplb.events.json_log import configure_json_logging as configure_json_logging
    from async_eplb.events.metrics import Metrics as Metrics
    from async_eplb.events.schema import LayerCommitted as LayerCommitted
    from async_eplb.events.tracing import Spans as Spans
    from async_eplb.expert_map import ExpertMap as ExpertMap
    from async_eplb.expert_map import LayerCommit as LayerCommit
    from async_eplb.load.group import GlooLoadGroup as GlooLoadGroup
    from async_eplb.load.source import LoadSnapshot as LoadSnapshot
    from async_eplb.load.source import LoadSource as LoadSource
    from async_eplb.load.value import ExpertLoad as ExpertLoad
    from async_eplb.load.window import LoadWindow as LoadWindow
    from async_eplb.map_tables import MapTables as MapTables
    from async_eplb.options import UpdateOptions as UpdateOptions
    from async_eplb.placement import ExpertPlacement as ExpertPlacement
    from async_eplb.plan import LayerPlan as LayerPlan
    from async_eplb.plan import Planner as Planner
    from async_eplb.plan import SlotSource as SlotSource
    from async_eplb.plan import plan_layer as plan_layer
    from async_eplb.plan import plan_update as plan_update
    from async_eplb.plan import relabel as relabel
    from async_eplb.policy import Global as Global
    from async_eplb.policy import Hierarchical as Hierarchical
    from async_eplb.policy import Incremental as Incremental
    from async_eplb.policy import RebalanceTerms as RebalanceTerms
    from async_eplb.rebalancer import RebalanceOptions as RebalanceOptions
    from async_eplb.rebalancer import Rebalancer as Rebalancer
    from async_eplb.recovery.state import Recovery as Recovery
    from async_eplb.recovery.survivors import on_survivors as on_survivors
    from async_eplb.recovery.weight_source import SafetensorsSource as SafetensorsSource
    from async_eplb.recovery.weight_source import WeightSource as WeightSource
    from async_eplb.sync import SyncUpdater as SyncUpdater
    from async_eplb.sync_rebalancer import SyncRebalancer as SyncRebalancer
    from async_eplb.topology import EPTopology as EPTopology
    from async_eplb.transport import CopyEngineTransport as CopyEngineTransport
    from async_eplb.transport import HybridTransport as HybridTransport
    from async_eplb.transport import MemoryTransport as MemoryTransport
    from async_eplb.transport import NcclOptions as NcclOptions
    from async_eplb.transport import TorchDistTransport as TorchDistTransport
    from async_eplb.transport import Transport as Transport
    from async_eplb.transport import open_first_usable as open_first_usable
    from async_eplb.update.handle import UpdateHandle as UpdateHandle
    from async_eplb.update.summary import UpdaterStatistics as UpdaterStatistics
    from async_eplb.update.summary import UpdateSummary as UpdateSummary
    from async_eplb.updater import ExpertUpdater as ExpertUpdater
    from async_eplb.weights import ExpertWeights as ExpertWeights

__version__ = "0.2.0.dev0"

_HOMES = {
    "errors": ("EplbError",),
    "events.emit": ("StandardLogger",),
    "events.event_logger": ("EventLogger",),
    "events.json_log": ("configure_json_logging",),
    "events.metrics": ("Metrics",),
    "events.schema": ("LayerCommitted",),
    "events.tracing": ("Spans",),
    "expert_map": ("ExpertMap", "LayerCommit"),
    "load.group": ("GlooLoadGroup",),
    "load.source": ("LoadSnapshot", "LoadSource"),
    "load.value": ("ExpertLoad",),
    "load.window": ("LoadWindow",),
    "map_tables": ("MapTables",),
    "options": ("UpdateOptions",),
    "placement": ("ExpertPlacement",),
    "plan": ("LayerPlan", "Planner", "SlotSource", "plan_layer", "plan_update", "relabel"),
    "policy": ("Global", "Hierarchical", "Incremental", "RebalanceTerms"),
    "rebalancer": ("RebalanceOptions", "Rebalancer"),
    "recovery.state": ("Recovery",),
    "recovery.survivors": ("on_survivors",),
    "recovery.weight_source": ("SafetensorsSource", "WeightSource"),
    "sync": ("SyncUpdater",),
    "sync_rebalancer": ("SyncRebalancer",),
    "topology": ("EPTopology",),
    "transport": (
        "CopyEngineTransport",
        "HybridTransport",
        "MemoryTransport",
        "NcclOptions",
        "TorchDistTransport",
        "Transport",
        "open_first_usable",
    ),
    "update.handle": ("UpdateHandle",),
    "update.summary": ("UpdaterStatistics", "UpdateSummary"),
    "updater": ("ExpertUpdater",),
    "weights": ("ExpertWeights",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the names of the table


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
