"""Transports keep their contract: one conformance suite for all; over real sockets it runs between processes."""

from collections.abc import Callable

import pytest
from helpers import together

from async_eplb import MemoryTransport, TorchDistTransport
from async_eplb.errors import BrokenTransport
from async_eplb.launch import WorldRank, run_world
from async_eplb.testing import check_transport
from async_eplb.transport import LaunchRule, MemorySchedule
from async_eplb.transport.base import Exchange

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("jitter_s", [0.0, 0.002])
@pytest.mark.parametrize("launch_rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED])
async def test_memory_keeps_the_contract(num_ranks: int, jitter_s: float, launch_rule: LaunchRule) -> None:
    """The conformance suite inside one event loop, messages in order and out of it, sent and read."""
    world = MemoryTransport.world(num_ranks, MemorySchedule(message_jitter_s=jitter_s, launch_rule=launch_rule))
    outcomes = await together([lambda t=transport: check_transport(t, num_exchanges=2) for transport in world])  # type: ignore[misc]
    assert outcomes == [None] * num_ranks


class _Gone:
    """A link that has noticed, before a launch, that a peer is gone."""

    def launch(self, exchange: Exchange) -> Callable[[float], None]:
        raise RuntimeError(f"row {exchange.row}: remote process exited")


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
