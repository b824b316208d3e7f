"""Transport over torch.distributed: gloo between CPUs, NCCL between GPUs, on communicators of its own."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb.agreement import LaunchRule
from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import BrokenTransport, TransferTimeout
from async_eplb.transport.base import ControlGroup, Exchange, Message, MessageGroup, PendingExchange
from async_eplb.transport.joining import Member
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

Backend = Literal["gloo", "nccl"]

_CONNECT_TIMEOUT_S = 300.0
_NCCL_POLL_S = 0.0002


class TorchDistTransport(Member):
    """Moves weights between the processes of a torch.distributed group.

    The group given is only used to find the other ranks: the transport opens communicators of its own, so that it
    never disturbs the group's operations. Like all calls that concern a group, transports are constructed in the
    same order on all its ranks.

    :param group: the EP group, of which this process must be a member; the world without it
    :param backend: ``"gloo"`` or ``"nccl"``; without it, by the device of the weights
    :raises BrokenTransport: if this process is not in the group
    """

    def __init__(self, group: ProcessGroup | None = None, *, backend: Backend | None = None) -> None:
        super().__init__(group)
        self._backend = backend
        self._link: _Link | None = None

    def __repr__(self) -> str:
        return f"<TorchDistTransport rank {self._rank} of {self._num_ranks}, {self._backend}, {self._state}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """Ordered with NCCL; it is known which backend it is once the transport is open."""
        return LaunchRule.ORDERED if self.needs_ordered_launch else LaunchRule.AT_ONCE

    @property
    def needs_ordered_launch(self) -> bool:
        """Whether the backend is NCCL."""
        return self._backend == "nccl"

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,  # noqa: ARG002 - messages bring their bytes
        *,
        control_timeout_s: float,
    ) -> ControlGroup:
        """Connect the data and the control group, pair by pair, before the first byte is moved."""
        self._become_open()
        if self._backend is None:
            self._backend = "nccl" if device.torch_device.type == "cuda" else "gloo"
        connect = partial(self._connect, device, workers, control_timeout_s)
        return await workers.run("control", connect)

    def _connect(self, device: Device, workers: Workers, control_timeout_s: float) -> ControlGroup:
        make = _NcclLink if self._backend == "nccl" else _GlooLink
        self._link = make(PrefixStore("data", self._store), self._rank, self._num_ranks, device, workers)
        return self._connect_control(workers, control_timeout_s)

    def launch(self, exchange: Exchange) -> PendingExchange:
        """Post an exchange; with NCCL, behind the current stream of the calling thread."""
        if self._link is None:
            raise BrokenTransport(f"{self!r} cannot move anything", rank=self._rank)
        return _Pending(self, exchange, self._link.launch(exchange))

    def abort(self) -> None:
        """Break the transport and close its data connections."""
        if self._link is not None:
            self._link.abort()
        self._link = None
        self._state = "broken"

    async def aclose(self) -> None:
        """Close the data connections."""
        self._link = None
        self._become_closed()


_Finish = Callable[[float], None]
"""Blocks until an exchange has finished, or raises TimeoutError at a deadline of time.monotonic()."""


class _Link(Protocol):
    """A data communicator."""

    workers: Workers

    def launch(self, exchange: Exchange) -> _Finish: ...

    def abort(self) -> None: ...


class _Pending:
    def __init__(self, transport: TorchDistTransport, exchange: Exchange, finish: _Finish) -> None:
        self._transport = transport
        self._row = exchange.row
        self._finish = finish

    async def wait(self, timeout_s: float) -> None:
        link = self._transport._link
        if link is None:
            raise BrokenTransport(f"{self._transport!r} was aborted", rank=self._transport.rank)
        deadline = time.monotonic() + timeout_s
        try:
            await link.workers.run("exchange", partial(self._finish, deadline))
        except (RuntimeError, TimeoutError) as error:
            self._transport.abort()
            where = f"rank {self._transport.rank}, row {self._row}"
            if time.monotonic() >= deadline:
                raise TransferTimeout(
                    f"{where}: the exchange did not finish within {timeout_s} s ({error})",
                    rank=self._transport.rank,
                    layer=self._row,
                    timeout_s=timeout_s,
                ) from error
            raise BrokenTransport(f"{where}: {error}", rank=self._transport.rank) from error


class _GlooLink:
    """Gloo sends from and receives into host memory; tensors of a GPU pass through pinned memory."""

    def __init__(self, store: Store, rank: int, num_ranks: int, device: Device, workers: Workers) -> None:
        self.workers = workers
        self._device = device
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(
            store, rank, num_ranks, timedelta(seconds=_CONNECT_TIMEOUT_S)
        )

    def launch(self, exchange: Exchange) -> _Finish:
        """Defer posting to the exchange's thread: writing to a socket can block."""
        return partial(self._run, exchange)

    def abort(self) -> None:
        """Drop the group, which closes its connections once no thread is inside it."""
        self._group = None

    def _run(self, exchange: Exchange, deadline: float) -> None:
        for group in exchange.groups:
            self._run_group(group, deadline)

    def _run_group(self, messages: MessageGroup, deadline: float) -> None:
        group = self._group
        if group is None:
            raise RuntimeError("the transport was aborted")
        incoming = [self._host(message.data) for message in messages.recvs]
        outgoing = self._to_host(messages.sends)
        works = [
            group.recv([data], message.peer, message.tag)  # type: ignore[attr-defined]
            for message, data in zip(messages.recvs, incoming, strict=True)
        ]
        works += [
            group.send([data], message.peer, message.tag)  # type: ignore[attr-defined]
            for message, data in zip(messages.sends, outgoing, strict=True)
        ]
        for work in works:
            remaining_s = max(deadline - time.monotonic(), 0.001)
            work.wait(timedelta(seconds=remaining_s))
        self._from_host(messages.recvs, incoming)

    def _host(self, data: Tensor) -> Tensor:
        return data if data.device.type == "cpu" else torch.empty_like(data, device="cpu", pin_memory=True)

    def _to_host(self, messages: tuple[Message, ...]) -> list[Tensor]:
        host = [self._host(message.data) for message in messages]
        self._copy(host, [message.data for message in messages])
        return host

    def _from_host(self, messages: tuple[Message, ...], host: list[Tensor]) -> None:
        self._copy([message.data for message in messages], host)

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        moved = [pair for pair in zip(targets, sources, strict=True) if pair[0] is not pair[1]]
        if not moved:
            return
        with self._device.transferring():
            for target, source in moved:
                target.copy_(source, non_blocking=True)
            self._device.record().synchronize()


class _NcclLink:
    """NCCL sends and receives on the current stream, on a communicator that is only used for this."""

    def __init__(self, store: Store, rank: int, num_ranks: int, device: Device, workers: Workers) -> None:
        self.workers = workers
        self._device = device
        timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._nccl = dist.ProcessGroupNCCL(store, rank, num_ranks, options)
        self._group = ProcessGroup(store, rank, num_ranks)
        backend_type = ProcessGroup.BackendType.NCCL
        self._group._set_default_backend(backend_type)
        self._group._register_backend(device.torch_device, backend_type, self._nccl)
        self._connect(rank, num_ranks)

    def _connect(self, rank: int, num_ranks: int) -> None:
        """Exchange one byte with every peer: connections made later would allocate memory while serving."""
        peers = [peer for peer in range(num_ranks) if peer != rank]
        data = self._device.allocate(2 * num_ranks).view(2, num_ranks, 1)
        group = MessageGroup(
            sends=tuple(Message(peer, 0, data[0, peer]) for peer in peers),
            recvs=tuple(Message(peer, 0, data[1, peer]) for peer in peers),
        )
        with self._device.transferring():
            self._post(group)
            event = self._device.record()
        self._wait(event, time.monotonic() + _CONNECT_TIMEOUT_S)

    def launch(self, exchange: Exchange) -> _Finish:
        """Enqueue all groups behind the current stream of this thread."""
        for group in exchange.groups:
            self._post(group)
        return partial(self._wait, self._device.record())

    def abort(self) -> None:
        """Abort the communicator; kernels that wait for a peer end."""
        self._nccl.abort()

    def _post(self, messages: MessageGroup) -> None:
        if not messages.sends and not messages.recvs:
            return
        torch_device = self._device.torch_device
        self._group._start_coalescing(torch_device)
        for message in messages.recvs:
            self._group.recv([message.data], message.peer, message.tag)
        for message in messages.sends:
            self._group.send([message.data], message.peer, message.tag)
        work: Work = self._group._end_coalescing(torch_device)
        work.wait()

    @staticmethod
    def _wait(event: DeviceEvent, deadline: float) -> None:
        while not event.query():
            if time.monotonic() >= deadline:
                raise TimeoutError("NCCL is still waiting for a peer")
            time.sleep(_NCCL_POLL_S)
