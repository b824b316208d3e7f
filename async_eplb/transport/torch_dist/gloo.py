"""Messages over gloo."""

import time
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

from async_eplb.device import Device
from async_eplb.transport.control import close_connections
from async_eplb.transport.exchange import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.link import NUM_HOPS, Launch


class GlooLink:
    """Sends from and receives into host memory; tensors of a GPU pass through pinned memory.

    Two rows may be under way between a pair, with equal tags, but only in different hops: these have tags of their own.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, device: Device, *, timeout: timedelta) -> None:
        self._device = device
        self._peers = [peer for peer in range(num_ranks) if peer != rank]
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, num_ranks, timeout)

    def prepare(self, exchange: Exchange) -> Launch:
        """Leave all posting to the exchange's thread: writing to a socket can block."""
        return lambda: partial(self._run, exchange)

    def abort(self) -> None:
        """Close all connections, so that threads inside the group stop waiting, here and at peers."""
        group, self._group = self._group, None
        if group is not None:
            close_connections(group, self._peers)

    def _run(self, exchange: Exchange, deadline: float) -> None:
        for group in exchange.groups:
            self._run_group(group, exchange.hop, deadline)

    def _run_group(self, messages: MessageGroup, hop: int, deadline: float) -> None:
        group = self._group
        if group is None:
            raise RuntimeError("the transport was aborted")
        incoming = [self._host(message.data) for message in messages.recvs]
        outgoing = self._to_host(messages.sends)
        works = [
            group.recv([data], message.peer, NUM_HOPS * message.tag + hop)  # type: ignore[attr-defined]
            for message, data in zip(messages.recvs, incoming, strict=True)
        ]
        works += [
            group.send([data], message.peer, NUM_HOPS * message.tag + hop)  # type: ignore[attr-defined]
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
