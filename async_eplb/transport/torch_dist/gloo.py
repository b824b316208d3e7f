"""Messages over gloo."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import Store

from async_eplb.device import Device
from async_eplb.transport.control import close_connections
from async_eplb.transport.exchange import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.link import NUM_HOPS, Launch
from async_eplb.weights import ExpertWeights

OnHost = tuple[Message, Tensor]
"""A message, and the host memory that gloo reads or writes for it: its own data, or a place for it to pass through."""


class GlooLink:
    """Sends from and receives into host memory; tensors of a GPU pass through pinned memory.

    Two rows may be under way between a pair, with equal tags, but only in different hops: these have tags of their own.

    :param weights: that are moved
    :param relays: whether there are second hops
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        device: Device,
        weights: ExpertWeights,
        *,
        relays: bool,
        timeout: timedelta,
    ) -> None:
        self._device = device
        self._pinned: Tensor | None = None
        """Where a layer of a GPU passes through: of each hop, for sends and receives ``[hops, 2, bytes]``."""
        if device.torch_device.type != "cpu":
            layer_nbytes = weights.num_local_physical_experts * max(sum(weights.slot_nbytes(r)) for r in weights.rows)
            shape = (NUM_HOPS if relays else 1, 2, layer_nbytes)
            self._pinned = device.allocate_host(math.prod(shape)).view(shape)
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
        """Post all receives, then sends as far as they fit host memory, and so on.

        No rank waits for its sends before it has posted all its receives, so there is no circle of waiting ranks.
        """
        group = self._group
        if group is None:
            raise RuntimeError("the transport was aborted")
        for_sends, for_recvs = (None, None) if self._pinned is None else self._pinned[hop]
        (incoming,) = batches(messages.recvs, for_recvs)
        recvs = [
            group.recv([data], message.peer, NUM_HOPS * message.tag + hop)  # type: ignore[attr-defined]
            for message, data in incoming
        ]
        for outgoing in batches(messages.sends, for_sends):
            self._copy((data, message.data) for message, data in outgoing)
            sends = [
                group.send([data], message.peer, NUM_HOPS * message.tag + hop)  # type: ignore[attr-defined]
                for message, data in outgoing
            ]
            _wait(sends, deadline)
        _wait(recvs, deadline)
        self._copy((message.data, data) for message, data in incoming)

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy the second of each pair to the first, unless it is the same."""
        moved = [(target, source) for target, source in pairs if target is not source]
        if not moved:
            return
        with self._device.transferring():
            for target, source in moved:
                target.copy_(source, non_blocking=True)
            self._device.record().synchronize()


def batches(messages: Sequence[Message], pinned: Tensor | None) -> Iterator[list[OnHost]]:
    """Give each message a place in host memory; yield as many at a time as fit, at least one batch.

    :param pinned: host memory uint8 ``[bytes]``; None: messages are in host memory themselves
    """
    batch: list[OnHost] = []
    end = 0
    for message in messages:
        if pinned is None:
            batch.append((message, message.data))
            continue
        start, end = end, end + message.data.nbytes
        if end > len(pinned):
            yield batch
            batch, start, end = [], 0, message.data.nbytes
        batch.append((message, pinned[start:end]))
    yield batch


def _wait(works: Sequence[Work], deadline: float) -> None:
    for work in works:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
