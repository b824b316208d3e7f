"""Transports that can be chosen by name keep the contract, each under its name."""

import anyio
import pytest
from support.shared_memory import SharedMemory, be_on_host

from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.transport import TRANSPORTS, TransportOptions


def conform(world: WorldRank, name: str, ranks_per_host: int) -> int:
    """Run the conformance suite on CPUs; return how much is still mapped."""
    be_on_host(world.rank // ranks_per_host)
    memory = SharedMemory()
    transport = TRANSPORTS[name](TransportOptions(backend="gloo", memory=lambda _: memory))
    anyio.run(lambda: check_transport(transport, device=memory, seed=world.num_ranks))
    return len(memory.mapped)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_each_keeps_the_contract(name: str) -> None:
    """On one host."""
    assert run_world(conform, 3, name, 3) == [0] * 3
