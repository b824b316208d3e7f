"""Move bytes between ranks: the contract, and a folder for each way to do it."""

from async_eplb.agreement.rules import LaunchRule
from async_eplb.transport.base import ControlGroup, PendingExchange, PreparedExchange, Transport, Voter
from async_eplb.transport.copy_engine.transport import CopyEngineTransport
from async_eplb.transport.exchange import Exchange, Message, MessageGroup, Pull, Pulls, SlotMemory
from async_eplb.transport.first_usable import FirstUsable, open_first_usable
from async_eplb.transport.hybrid import HybridTransport
from async_eplb.transport.identity import Identity
from async_eplb.transport.memory.schedule import Fault, FaultKind, MemorySchedule
from async_eplb.transport.memory.transport import MemoryTransport
from async_eplb.transport.table import TRANSPORTS, TransportOptions
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.transport import TorchDistTransport

__all__ = [
    "TRANSPORTS",
    "ControlGroup",
    "CopyEngineTransport",
    "Exchange",
    "Fault",
    "FaultKind",
    "FirstUsable",
    "HybridTransport",
    "Identity",
    "LaunchRule",
    "MemorySchedule",
    "MemoryTransport",
    "Message",
    "MessageGroup",
    "NcclOptions",
    "PendingExchange",
    "PreparedExchange",
    "Pull",
    "Pulls",
    "SlotMemory",
    "TorchDistTransport",
    "Transport",
    "TransportOptions",
    "Voter",
    "open_first_usable",
]
