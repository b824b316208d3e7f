"""Opening: all ranks come, are who they should be, or are named."""

from collections.abc import Callable
from functools import partial

import anyio
import pytest
from support.groups import small_updater, stateless_groups
from support.helpers import together
from support.shared_memory import SharedMemory
from torch.distributed import ProcessGroup

from async_eplb import (
    CopyEngineTransport,
    GlooLoadGroup,
    HybridTransport,
    MemoryTransport,
    TorchDistTransport,
    Transport,
)
from async_eplb.errors import BrokenLoadGroup, BrokenTransport, OpenTimeout
from async_eplb.transport import open_first_usable
from async_eplb.updater import ExpertUpdater

pytestmark = pytest.mark.anyio

Make = Callable[[ProcessGroup], Transport]


def copy(group: ProcessGroup) -> Transport:
    """Make a copy engine that needs no GPU."""
    memory = SharedMemory()
    return CopyEngineTransport(group, memory=lambda _: memory)


def hybrid(group: ProcessGroup) -> Transport:
    """Make a hybrid that needs no GPU."""
    memory = SharedMemory()
    return HybridTransport(group, memory=lambda _: memory)


def first(group: ProcessGroup) -> Transport:
    """Make a choice of two."""
    return open_first_usable([TorchDistTransport(group), TorchDistTransport(group)])


MAKERS: list[Make] = [TorchDistTransport, copy, hybrid, first]


async def enter(updater: ExpertUpdater) -> None:
    """Enter and leave."""
    async with updater:
        pass


@pytest.mark.parametrize("make", MAKERS)
async def test_a_rank_that_never_opens_is_named(make: Make) -> None:
    """In time, on all that wait, whatever they wait with."""
    groups = stateless_groups(3)
    updaters = [small_updater(make(group), open_timeout_s=0.1) for group in groups]
    begun = anyio.current_time()
    outcomes = await together([partial(enter, updater) for updater in updaters[:2]])
    assert [(type(each), each.missing, each.timeout_s) for each in outcomes] == [(OpenTimeout, (2,), 0.1)] * 2
    assert anyio.current_time() - begun < 5


@pytest.mark.parametrize("make", MAKERS)
async def test_a_rank_that_has_made_one_more_is_told_from_one_that_is_late(make: Make) -> None:
    """The error of each rank says how many the other has made."""
    groups = stateless_groups(2)
    make(groups[1])
    updaters = [small_updater(make(group), open_timeout_s=0.1) for group in groups]
    for rank, outcome in enumerate(await together([partial(enter, updater) for updater in updaters])):
        assert isinstance(outcome, OpenTimeout)
        assert outcome.missing == (1 - rank,)
        assert f"rank {1 - rank} has made" in str(outcome)
        assert "and open them in the same order" in str(outcome)


async def test_ranks_that_wait_in_different_updaters_are_told_of_both() -> None:
    """They have made as many, but open them in another order, one after another."""
    updaters = [
        {name: small_updater(TorchDistTransport(group), name=name, open_timeout_s=0.1) for name in ("target", "draft")}
        for group in stateless_groups(2)
    ]
    outcomes = await together([partial(enter, updaters[0]["target"]), partial(enter, updaters[1]["draft"])])
    assert [outcome.missing for outcome in outcomes] == [(1,), (0,)]
    assert "this is transport 1 of 2 here, and rank 1 opened transport 2 for 'draft' last" in str(outcomes[0])
    assert "this is transport 2 of 2 here, and rank 0 opened transport 1 for 'target' last" in str(outcomes[1])


async def test_a_named_updater_in_memory_waits_for_the_others() -> None:
    """As it does between processes."""
    updater = small_updater(MemoryTransport.world(2)[0], name="target", open_timeout_s=0.1)
    with pytest.raises(OpenTimeout) as caught:
        await enter(updater)
    assert caught.value.missing == (1,)


async def test_a_load_group_that_not_all_open_names_those() -> None:
    """As the groups of weights do."""
    outcomes = await together([partial(GlooLoadGroup.open, group, timeout_s=0.1) for group in stateless_groups(3)[1:]])
    assert [(type(each), each.missing) for each in outcomes] == [(BrokenLoadGroup, (0,))] * 2


async def test_waiting_for_others_can_be_cancelled() -> None:
    """At once, however long it would wait; the transport is closed then."""
    transport = TorchDistTransport(stateless_groups(2)[0])
    begun = anyio.current_time()
    with anyio.move_on_after(0.1):
        await enter(small_updater(transport, open_timeout_s=1000))
    assert anyio.current_time() - begun < 5
    assert "closed" in repr(transport)


async def test_what_fails_while_ranks_connect_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a peer dies between coming and connecting."""

    def fail(*_: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr("async_eplb.transport.joining.GlooControlGroup.__init__", lambda *_, **__: fail())
    updaters = [small_updater(TorchDistTransport(group)) for group in stateless_groups(2)]
    for rank, outcome in enumerate(await together([partial(enter, updater) for updater in updaters])):
        assert isinstance(outcome, BrokenTransport)
        assert outcome.rank == rank
        assert "connectFullMesh failed" in str(outcome)
