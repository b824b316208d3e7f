"""Sends and receives of NCCL, on a communicator that nothing else uses."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import Store

from async_eplb.device import Device, DeviceEvent, until_passed
from async_eplb.errors import InvalidOptions
from async_eplb.transport.base import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.packing import _padded, copy_all, pack, packed_nbytes
from async_eplb.workers import Workers

_NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class NcclOptions:
    """How much of a GPU the transfers may take from the model.

    :param max_ctas: thread blocks of a communicator at most, each of which takes a multiprocessor while bytes move;
        where a planner relays, there are two communicators
    :param high_priority: whether NCCL's stream has the high priority
    :raises InvalidOptions: if ``max_ctas`` is not positive
    """

    max_ctas: int = 4
    high_priority: bool = False

    def __post_init__(self) -> None:
        if self.max_ctas < 1:
            raise InvalidOptions(f"max_ctas is {self.max_ctas}; it must be at least 1", option="max_ctas")


class _Posts(NamedTuple):
    """What is posted of a group, and what is copied to and from scratch memory before and after that."""

    sends: list[Message]
    packing: list[tuple[Tensor, Tensor]]
    recvs: list[Message]
    unpacking: list[tuple[Tensor, Tensor]]


class NcclLink:
    """A communicator for expert moves. What it launches goes behind the current stream.

    :param store: where ranks find each other; nobody else may use its keys
    :param members: ranks of the EP group that it connects, ascending
    :param timeout: of connecting and of aborting
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[int],
        device: Device,
        workers: Workers,
        *,
        timeout: timedelta,
        options: NcclOptions,
    ) -> None:
        self.workers = workers
        self._device = device
        self._scratch = self._no_scratch()
        self._prepared: WeakKeyDictionary[MessageGroup, _Posts] = WeakKeyDictionary()
        settings = dist.ProcessGroupNCCL.Options(is_high_priority_stream=options.high_priority)
        settings._timeout = timeout
        settings.config.max_ctas = options.max_ctas
        self._place = {member: place for place, member in enumerate(members)}
        with _unwatched():
            self._nccl = dist.ProcessGroupNCCL(store, self._place[rank], len(members), settings)
        self._group = ProcessGroup(store, self._place[rank], len(members))
        backend_type = ProcessGroup.BackendType.NCCL
        self._group._set_default_backend(backend_type)
        self._group._register_backend(device.torch_device, backend_type, self._nccl)
        self._connect([member for member in members if member != rank], timeout)

    def _connect(self, peers: Sequence[int], timeout: timedelta) -> None:
        """Exchange two bytes with every peer, packed.

        Connections made later would allocate memory while serving. Kernels, which CUDA loads when they are first
        launched, could wait for a transfer that is under way.
        """
        tags = range(2)
        data = self._device.allocate(2 * len(peers) * len(tags)).view(2, len(peers), len(tags), 1)
        sends, recvs = (
            tuple(Message(peer, tag, side[place, tag]) for place, peer in enumerate(peers) for tag in tags)
            for side in data
        )
        with self._device.transferring():
            self._post(MessageGroup(sends, recvs))
            event = self._device.record()
        until_passed(event, time.monotonic() + timeout.total_seconds())
        self._scratch = self._no_scratch()  # what launches use must not be from this stream, which may be another

    def prepare(self, exchange: Exchange) -> None:
        """Work out how small messages are packed, and make room for them; with the stream of the launch current."""
        for group in exchange.groups:
            self._prepared[group] = self._posts(group)

    def launch(self, exchange: Exchange) -> Callable[[float], None]:
        """Enqueue all groups behind the current stream of this thread."""
        works = [work for group in exchange.groups if (work := self._post(group)) is not None]
        return partial(self._finish, works, self._device.record())

    def _finish(self, works: Sequence[Work], event: DeviceEvent, deadline: float) -> None:
        """Wait for the device, and then ask NCCL: kernels end too when a peer is gone, and what they left is no data.

        :raises TimeoutError: at the deadline
        :raises RuntimeError: if NCCL has met with an error
        """
        until_passed(event, deadline)
        with self._device.transferring():
            for work in works:
                work.wait()  # rule 12: this does not wait any more, but raises

    def abort(self) -> None:
        """Abort the communicator; kernels that wait for a peer end."""
        self._nccl.abort()

    def _post(self, messages: MessageGroup) -> Work | None:
        if not messages.sends and not messages.recvs:
            return None
        is_prepared = messages in self._prepared
        sends, packing, recvs, unpacking = self._prepared.pop(messages) if is_prepared else self._posts(messages)
        torch_device = self._device.torch_device
        copy_all(packing)
        self._group._start_coalescing(torch_device)
        try:
            for message in recvs:
                self._group.recv([message.data], self._place[message.peer], message.tag)
            for message in sends:
                self._group.send([message.data], self._place[message.peer], message.tag)
        except RuntimeError:
            self._leave_groups()
            raise
        work: Work = self._group._end_coalescing(torch_device)
        _behind(work)
        copy_all([(data, place) for place, data in unpacking])
        return work

    def _leave_groups(self) -> None:
        """Leave the two NCCL groups that torch leaves this thread in when an operation fails: ours, and one around it.

        NCCL would take all that the thread does later, on whatever communicator, for more of them, and never launch it.
        """
        for _ in range(2):
            with suppress(RuntimeError):  # the last one that is left reports the failure again
                self._group._end_coalescing(self._device.torch_device)

    def _posts(self, messages: MessageGroup) -> "_Posts":
        return _Posts(*self._packed("sends", messages.sends), *self._packed("recvs", messages.recvs))

    def _packed(self, side: str, messages: Sequence[Message]) -> tuple[list[Message], list[tuple[Tensor, Tensor]]]:
        """Return what is posted, and pairs of a place in scratch memory and the data of a message that belongs there.

        All groups use the same scratch memory: when one is launched, the stream is past the one before.
        """
        posted, packs = pack(messages)
        scratch = self._reserve(side, packed_nbytes(packs))
        pairs: list[tuple[Tensor, Tensor]] = []
        end = 0
        for small in packs:
            start = end
            for message in small:
                pairs.append((scratch[end : end + message.data.nbytes], message.data))
                end += _padded(message.data.nbytes)
            posted.append(Message(small[0].peer, small[0].tag, scratch[start:end]))
        return posted, pairs

    def _no_scratch(self) -> dict[str, Tensor]:
        return {side: self._device.allocate(0) for side in ("sends", "recvs")}

    def _reserve(self, side: str, nbytes: int) -> Tensor:
        """Return scratch memory of at least so many bytes. What is too small is in use until the stream is past it."""
        scratch = self._scratch[side]
        if scratch.nbytes < nbytes:
            with torch.inference_mode(mode=False):  # the next launch may be outside of the caller's
                scratch = self._scratch[side] = self._device.allocate(nbytes)
        return scratch


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let torch make a communicator that no thread of torch's watches.

    That watchdog ends the process when a peer is gone, and survivors with it, unless it is told otherwise in the
    environment, which it reads when a communicator is made. Its other choices wait for a minute, and tell all ranks
    through the store, whose own watchdogs then end them. Deadlines and losses are this package's to notice.
    """
    before = os.environ.get(_NO_WATCHDOG)
    os.environ[_NO_WATCHDOG] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_WATCHDOG]
        else:
            os.environ[_NO_WATCHDOG] = before


def _behind(work: Work) -> None:
    """Let the current stream wait for work; of communicators that nobody watches, `wait` would block this thread."""
    getattr(work, "block_current_stream", work.synchronize)()  # the first is there since torch 2.9
