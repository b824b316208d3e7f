"""Transports keep their contract: one conformance suite for all; over real sockets it runs between processes."""

import pytest
from helpers import together

from async_eplb import MemoryTransport
from async_eplb.testing import check_transport
from async_eplb.transport import LaunchRule, MemorySchedule

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("jitter_s", [0.0, 0.002])
@pytest.mark.parametrize("launch_rule", [LaunchRule.AT_ONCE, LaunchRule.GRANTED])
async def test_memory_keeps_the_contract(num_ranks: int, jitter_s: float, launch_rule: LaunchRule) -> None:
    """The conformance suite inside one event loop, messages in order and out of it, sent and read."""
    world = MemoryTransport.world(num_ranks, MemorySchedule(message_jitter_s=jitter_s, launch_rule=launch_rule))
    outcomes = await together([lambda t=transport: check_transport(t, num_exchanges=2) for transport in world])  # type: ignore[misc]
    assert outcomes == [None] * num_ranks
