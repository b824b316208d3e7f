"""Sends and receives of NCCL, on a communicator that nothing else uses."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import Store

from async_eplb.arguments import Flag, Whole, settle
from async_eplb.device import Device, DeviceEvent, until_passed
from async_eplb.errors import InvalidOptions
from async_eplb.transport.exchange import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.link import Finish, Launch
from async_eplb.transport.torch_dist.packing import Packer, Posts, copy_all, packed_nbytes
from async_eplb.weights import ExpertWeights

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
        settle(self, InvalidOptions, max_ctas=Whole(1), high_priority=Flag())


class NcclLink:
    """Exchanges over a communicator that nothing else uses. Launches go behind the current stream.

    :param group: torch's group over the communicator
    :param abort: aborts the communicator; kernels that wait for a peer end
    :param place: rank of the EP group -> rank in ``group``
    :param packed_nbytes: scratch memory for messages to a peer that are packed, and as much for those from it
    """

    def __init__(
        self,
        group: ProcessGroup,
        abort: Callable[[], None],
        device: Device,
        place: Mapping[int, int],
        packed_nbytes: int,
    ) -> None:
        self.abort = abort
        self._group = group
        self._device = device
        self._place = place
        shape = (2, len(place), packed_nbytes)
        self._packer = Packer(device.allocate(math.prod(shape)).view(shape), place)

    @classmethod
    def connect(
        cls,
        store: Store,
        rank: int,
        members: Sequence[int],
        device: Device,
        weights: ExpertWeights,
        *,
        timeout: timedelta,
        options: NcclOptions,
    ) -> "NcclLink":
        """Make a communicator and connect it to every peer, which must all be connecting.

        Called with the stream of its launches current.

        :param store: where ranks find each other; nobody else may use its keys
        :param members: ranks of the EP group that it connects, ascending
        :param weights: that are moved
        :param timeout: of connecting and of aborting
        """
        settings = dist.ProcessGroupNCCL.Options(is_high_priority_stream=options.high_priority)
        settings._timeout = timeout
        settings.config.max_ctas = options.max_ctas
        place = {member: number for number, member in enumerate(members)}
        with _unwatched():
            nccl = dist.ProcessGroupNCCL(store, place[rank], len(members), settings)
        group = ProcessGroup(store, place[rank], len(members))
        backend_type = ProcessGroup.BackendType.NCCL
        group._set_default_backend(backend_type)
        group._register_backend(device.torch_device, backend_type, nccl)
        peers = [member for member in members if member != rank]
        link = cls(group, nccl.abort, device, place, packed_nbytes(weights, len(members)))
        link.warm_up(peers, timeout)
        return link

    def warm_up(self, peers: Sequence[int], timeout: timedelta) -> None:
        """Exchange two bytes with every peer, packed if any are.

        Connections made later would allocate memory while serving. Kernels, which CUDA loads when they are first
        launched, could wait for a transfer that is under way.
        """
        tags = range(2)
        data = self._device.allocate(2 * len(peers) * len(tags)).view(2, len(peers), len(tags), 1)
        sends, recvs = (
            tuple(Message(peer, tag, side[place, tag]) for place, peer in enumerate(peers) for tag in tags)
            for side in data
        )
        self._post(self._packer.posts(MessageGroup(sends, recvs)))
        until_passed(self._device.record(), time.monotonic() + timeout.total_seconds())

    def prepare(self, exchange: Exchange) -> Launch:
        """Work out how small messages are packed."""
        return partial(self._launch, [self._packer.posts(group) for group in exchange.groups])

    def _launch(self, groups: Sequence[Posts]) -> Finish:
        """Enqueue all groups behind the current stream of this thread."""
        works = [work for posts in groups if (work := self._post(posts)) is not None]
        return partial(self._finish, works, self._device.record())

    def _finish(self, works: Sequence[Work], event: DeviceEvent, deadline: float) -> None:
        """Wait for the device, and then ask NCCL: kernels also end when a peer is gone, and then leave no data.

        :raises TimeoutError: at the deadline
        :raises RuntimeError: if NCCL has met with an error
        """
        until_passed(event, deadline)
        with self._device.transferring():
            for work in works:
                work.wait()  # rule 12: this does not wait any more, but raises

    def _post(self, posts: Posts) -> Work | None:
        sends, packing, recvs, unpacking = posts
        if not sends and not recvs:
            return None
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


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let the body make communicators that torch's watchdog threads ignore.

    A watchdog ends the process when a peer is gone, and so all survivors, unless the environment, which it reads when a
    communicator is made, forbids that. Its other settings wait for a minute, and inform all ranks through the store,
    whose own watchdogs then end them. This package notices deadlines and losses itself.
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
    """Let the current stream wait for work; `wait` would block this thread where no watchdog watches."""
    getattr(work, "block_current_stream", work.synchronize)()  # the first is there since torch 2.9
