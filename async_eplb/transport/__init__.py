"""Move bytes between ranks: the contract, and one module for each way to do it."""

from async_eplb.agreement.rules import LaunchRule
from async_eplb.transport.base import (
    ControlGroup,
    Exchange,
    Message,
    MessageGroup,
    PendingExchange,
    Pull,
    Pulls,
    SlotMemory,
    Transport,
    Voter,
)
from async_eplb.transport.copy_engine.transport import CopyEngineTransport
from async_eplb.transport.hybrid import HybridTransport
from async_eplb.transport.memory.schedule import Fault, FaultKind, MemorySchedule
from async_eplb.transport.memory.transport import MemoryTransport
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.transport import TorchDistTransport

__all__ = [
    "ControlGroup",
    "CopyEngineTransport",
    "Exchange",
    "Fault",
    "FaultKind",
    "HybridTransport",
    "LaunchRule",
    "MemorySchedule",
    "MemoryTransport",
    "Message",
    "MessageGroup",
    "NcclOptions",
    "PendingExchange",
    "Pull",
    "Pulls",
    "SlotMemory",
    "TorchDistTransport",
    "Transport",
    "Voter",
]
