"""Move bytes between ranks: the contract, and one module for each way to do it."""

from async_eplb.transport.base import (
    ControlGroup,
    Exchange,
    Message,
    MessageGroup,
    PendingExchange,
    Transport,
    Voter,
)
from async_eplb.transport.memory import Fault, FaultKind, MemorySchedule, MemoryTransport
from async_eplb.transport.torch_dist import TorchDistTransport

__all__ = [
    "ControlGroup",
    "Exchange",
    "Fault",
    "FaultKind",
    "MemorySchedule",
    "MemoryTransport",
    "Message",
    "MessageGroup",
    "PendingExchange",
    "TorchDistTransport",
    "Transport",
    "Voter",
]
