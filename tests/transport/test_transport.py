"""Transports keep their contract: one conformance suite for all; over real sockets it runs between processes."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import anyio
import pytest
import torch
import torch.distributed as dist
from support.helpers import together
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb import MemoryTransport, TorchDistTransport
from async_eplb.device import CpuDevice
from async_eplb.errors import BrokenTransport
from async_eplb.testing import check_transport
from async_eplb.testing.processes import WorldRank, run_world
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.transport.base import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.gloo import GlooLink
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

    def launch(self, exchange: Exchange) -> Callable[[float], None]:
        raise RuntimeError(f"row {exchange.row}: remote process exited")


class _Ending:
    """A link whose kernels end when it is aborted, while that is still under way."""

    def __init__(self) -> None:
        self.workers = ThreadWorkers()
        self._aborting, self._seen = threading.Event(), threading.Event()

    def launch(self, exchange: Exchange) -> Callable[[float], None]:  # noqa: ARG002
        return lambda _deadline: self._require(self._aborting)

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


def aborts_while_waiting(world: WorldRank) -> str:
    """Abort, from another thread as a serving one, while the loop waits for an exchange; return what it is told."""
    transport, link = TorchDistTransport(backend="gloo"), _Ending()
    transport._link = link  # type: ignore[assignment]

    async def wait_for_it() -> str:
        pending = transport.launch(Exchange(world.rank, ()))
        aborting = threading.Thread(target=transport.abort)
        aborting.start()
        try:
            await pending.wait(30)
        except BrokenTransport as error:
            return str(error)
        finally:
            link.see()
            aborting.join()
        return "it arrived"

    return anyio.run(wait_for_it)


def cannot_launch(world: WorldRank) -> str:
    """Launch over a link that is broken; return what is said of it."""
    transport = TorchDistTransport(backend="gloo")
    transport._link = _Gone()  # type: ignore[assignment]
    with pytest.raises(BrokenTransport) as caught:
        transport.launch(Exchange(3, ()))
    assert caught.value.rank == world.rank
    return str(caught.value)


def test_a_launch_that_fails_is_a_broken_transport() -> None:
    """So that whoever hears of it looks for the rank that is lost."""
    assert run_world(cannot_launch, 1) == ["rank 0, row 3: row 3: remote process exited"]


def test_what_an_abort_ends_is_no_arrival() -> None:
    """Also while the abort is still under way."""
    (said,) = run_world(aborts_while_waiting, 1)
    assert "aborted" in said


def aborts_in_two_hops(world: WorldRank) -> tuple[bool, str]:
    """Wait for what the peer never sends, in a hop that it does not wait in; abort; return how that ended.

    :returns: whether it ended before its deadline, and what it was told
    """
    link = GlooLink(_store(), world.rank, 2, CpuDevice(), ThreadWorkers(), timeout=timedelta(seconds=60))
    nothing = Message(1 - world.rank, 5, torch.zeros(8, dtype=torch.uint8))
    finish = link.launch(Exchange(0, (MessageGroup((), (nothing,)),), hop=world.rank))
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
    return PrefixStore("link", dist.distributed_c10d._get_default_store())


def test_an_abort_frees_who_waits_in_either_hop() -> None:
    """Neither rank keeps connections open that the other waits on."""
    assert all(in_time and told for in_time, told in run_world(aborts_in_two_hops, 2))
