"""The transports that can be chosen by name: one line each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from async_eplb.transport.base import Transport
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc, PeerMemory
from async_eplb.transport.copy_engine.transport import CopyEngineTransport
from async_eplb.transport.hybrid import HybridTransport
from async_eplb.transport.torch_dist.nccl import NcclOptions
from async_eplb.transport.torch_dist.transport import Backend, TorchDistTransport


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """Options of all transports; each uses those that concern it.

    :param group: the EP group, of which this process must be a member; the world without it
    :param backend: of messages; without it, by the device of the weights
    :param nccl: how much of the GPU NCCL may take
    :param memory: makes the object that maps and copies memory of other processes of this host
    """

    group: ProcessGroup | None = None
    backend: Backend | None = None
    nccl: NcclOptions = NcclOptions()  # noqa: RUF009 - a frozen value
    memory: Callable[[torch.device], PeerMemory] = CudaIpc


TRANSPORTS: dict[str, Callable[[TransportOptions], Transport]] = {
    "dist": lambda options: TorchDistTransport(options.group, backend=options.backend, nccl=options.nccl),
    "copy": lambda options: CopyEngineTransport(options.group, memory=options.memory),
    "hybrid": lambda options: HybridTransport(
        options.group, backend=options.backend, nccl=options.nccl, memory=options.memory
    ),
}
"""Name -> makes the transport of this process; all ranks of the group call it together."""
