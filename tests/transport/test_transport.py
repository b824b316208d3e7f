"""Transports keep their contract: one conformance suite for all; over real sockets it runs between processes."""

import threading
import time
from datetime import timedelta
from functools import partial

import anyio
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import float_weights, together
from support.updates import examples
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb import ExpertWeights, MemoryTransport
from async_eplb.device import CpuDevice
from async_eplb.errors import BrokenTransport
from async_eplb.testing import check_transport
from async_eplb.testing.processes import WorldRank, run_world
from async_eplb.transport import Exchange, LaunchRule, MemorySchedule, Message, MessageGroup
from async_eplb.transport.torch_dist.exchange import OpenLink
from async_eplb.transport.torch_dist.gloo import GlooLink, batches
from async_eplb.transport.torch_dist.link import Finish, Launch
from async_eplb.workers import ThreadWorkers

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("jitter_s", [0.0, 0.002])
@pytest.mark.parametrize("launch_rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED])
async def test_memory_keeps_the_contract(num_ranks: int, jitter_s: float, launch_rule: LaunchRule) -> None:
    """The conformance suite inside one event loop, messages in order and out of it, sent and read."""
    world = MemoryTransport.world(num_ranks, MemorySchedule(message_jitter_s=jitter_s, launch_rule=launch_rule))
    outcomes = await together([partial(check_transport, transport, num_exchanges=2) for transport in world])
    assert outcomes == [None] * num_ranks


class _Gone:
    """A link that has noticed, before a launch, that a peer is gone."""

    def prepare(self, exchange: Exchange) -> Launch:
        def launch() -> Finish:
            raise RuntimeError(f"row {exchange.row}: remote process exited")

        return launch

    def abort(self) -> None:
        pass


class _Ending:
    """A link whose kernels end when it is aborted, while that is still under way."""

    def __init__(self) -> None:
        self._aborting, self._seen = threading.Event(), threading.Event()

    def prepare(self, exchange: Exchange) -> Launch:  # noqa: ARG002
        return lambda: lambda _deadline: self._require(self._aborting)

    def abort(self) -> None:
        self._aborting.set()
        self._require(self._seen)

    def see(self) -> None:
        """Let the abort end."""
        self._seen.set()

    @staticmethod
    def _require(event: threading.Event) -> None:
        if not event.wait(30):
            raise AssertionError("the other side did not come")


def test_a_launch_that_fails_is_a_broken_transport() -> None:
    """So that a recovery looks for the lost rank."""
    link = OpenLink(_Gone(), 2, ThreadWorkers())
    with pytest.raises(BrokenTransport) as caught:
        link.prepare(Exchange(3, ())).launch()
    assert caught.value.rank == 2
    assert str(caught.value) == "rank 2, row 3: row 3: remote process exited"


def test_an_exchange_is_launched_once() -> None:
    """After that, its scratch memory is another exchange's."""
    prepared = OpenLink(_Ending(), 0, ThreadWorkers()).prepare(Exchange(0, ()))
    prepared.launch()
    with pytest.raises(RuntimeError, match="launched before"):
        prepared.launch()


async def test_what_an_abort_ends_is_no_arrival() -> None:
    """Also while the abort, by another thread such as a serving one, is still under way."""
    ending = _Ending()
    link = OpenLink(ending, 0, ThreadWorkers())
    prepared, pending = link.prepare(Exchange(1, ())), link.prepare(Exchange(0, ())).launch()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, link.abort)
        try:
            with pytest.raises(BrokenTransport, match="aborted"):
                await pending.wait(30)
            with pytest.raises(BrokenTransport, match="aborted"):
                prepared.launch()
            with pytest.raises(BrokenTransport, match="aborted"):
                link.prepare(Exchange(2, ()))
        finally:
            ending.see()


def aborts_in_two_hops(world: WorldRank) -> tuple[bool, str]:
    """Wait for a message that the peer never sends, in another hop than the peer waits in; abort; return the end of it.

    :returns: whether it ended before its deadline, and the error's message
    """
    weights, timeout = ExpertWeights(float_weights()), timedelta(seconds=60)
    link = GlooLink(_store(), world.rank, 2, CpuDevice(), weights, relays=True, timeout=timeout)
    nothing = Message(1 - world.rank, 5, torch.zeros(8, dtype=torch.uint8))
    finish = link.prepare(Exchange(0, (MessageGroup((), (nothing,)),), hop=world.rank))()
    told: list[str] = []

    def wait_for_it(deadline: float) -> None:
        try:
            finish(deadline)
        except RuntimeError as error:
            told.append(str(error))

    deadline = time.monotonic() + 40
    waiting = threading.Thread(target=wait_for_it, args=(deadline,))
    waiting.start()
    dist.barrier()
    link.abort()
    waiting.join()
    return time.monotonic() < deadline, told[0]


def _store() -> Store:
    return PrefixStore("link", dist.distributed_c10d._get_default_store())  # noqa: SLF001 - torch has no other


def test_an_abort_ends_waits_in_either_hop() -> None:
    """Neither rank keeps connections open that the other waits on."""
    assert all(in_time and told for in_time, told in run_world(aborts_in_two_hops, 2))


@examples
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(60, 200))
def test_gloo_sends_what_fits_host_memory_at_a_time(sizes: list[int], room: int) -> None:
    """Each message has a place of its own in its batch; nothing is copied where messages are on the host themselves."""
    messages = [Message(0, tag, torch.zeros(size, dtype=torch.uint8)) for tag, size in enumerate(sizes)]
    pinned = torch.zeros(room, dtype=torch.uint8)
    in_batches = list(batches(messages, pinned))
    assert [message for batch in in_batches for message, _ in batch] == messages
    for batch in in_batches:
        pinned.zero_()
        for message, place in batch:
            assert place.numel() == message.data.numel()
            place.add_(1)
        assert pinned.tolist() == sorted(pinned.tolist(), reverse=True)
        assert pinned.sum() == sum(message.data.numel() for message, _ in batch)
        assert pinned.max() <= 1
    (direct,) = batches(messages, None)
    assert all(place is message.data for message, place in direct)
