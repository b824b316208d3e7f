"""Groups of every kind are joined in one place, and ranks that do not come are named."""

import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.groups import stateless_groups
from support.shared_memory import SharedMemory, be_on_host
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb import (
    CopyEngineTransport,
    EPTopology,
    ExpertLoad,
    ExpertWeights,
    GlooLoadGroup,
    HybridTransport,
    LoadWindow,
    TorchDistTransport,
    Transport,
)
from async_eplb.device import CpuDevice
from async_eplb.errors import InvalidGroup, NotAMember, OpenTimeout
from async_eplb.groups import gather, join
from async_eplb.testing import WorldRank, check_transport, run_world
from async_eplb.transport.one_round import hold_round
from async_eplb.workers import ThreadWorkers

MAKERS = [
    TorchDistTransport,
    CopyEngineTransport,
    HybridTransport,
    lambda group: anyio.run(GlooLoadGroup.open, group),
    lambda group: EPTopology.from_group(group, 2),
]
"""All that joins a group."""
NOT_THIS_ONE = dist.GroupMember.NON_GROUP_MEMBER


class _Group:
    """An object that has what a group has, as far as it is told."""

    def __init__(self, rank: object, size: object, store: object) -> None:
        self.rank = lambda: rank
        self.size = lambda: size
        self.get_group_store = lambda: store


@pytest.mark.parametrize("make", MAKERS)
def test_without_a_default_group_the_error_says_so(make: Any) -> None:
    """It does not say that this process is no member of it."""
    with pytest.raises(InvalidGroup, match=r"no default process group: call .*init_process_group, or pass a group"):
        make(None)


@pytest.mark.parametrize("make", MAKERS)
def test_what_torch_gives_those_who_are_not_in_a_group(make: Any) -> None:
    """The error says that this process is not a member."""
    with pytest.raises(NotAMember, match="not a member of the group"):
        make(NOT_THIS_ONE)


def gloo_backend() -> ProcessGroupGloo:
    """Return a backend, which is no group and does not give its store away."""
    return ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=9))  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "group",
    [gloo_backend, lambda: _Group(0, 1, None), lambda: [0, 1], lambda: "world", object, lambda: 3],
    ids=["backend", "no store", "ranks", "name", "object", "number"],
)
def test_what_has_no_store_is_refused(make: Any, group: Any) -> None:
    """The error says what to pass in its place."""
    with pytest.raises(InvalidGroup, match=r"ProcessGroup\(store, rank, size\) makes one"):
        make(group())


class _Silent(Store):
    """A store that does not answer."""

    def add(self, key: str, amount: int) -> int:
        raise RuntimeError(f"{key} {amount}: connection reset by peer")


@given(st.integers(-3, 5), st.integers(-1, 4))
def test_a_rank_is_within_its_group(rank: int, size: int) -> None:
    """Whatever an object says of itself."""
    group: Any = _Group(rank, size, dist.HashStore())  # type: ignore[attr-defined]
    if 0 <= rank < size:
        board = join(group, "thing")
        assert (board.rank, board.num_ranks, board.number) == (rank, size, 1)
    else:
        with pytest.raises(NotAMember, match=f"{rank} of {size}"):
            join(group, "thing")


def test_a_store_that_does_not_answer_is_named() -> None:
    """As when the process that has it is gone."""
    with pytest.raises(InvalidGroup, match="the store of the group does not answer"):
        join(ProcessGroup(_Silent(), 0, 1), "thing")


def test_who_waits_in_a_store_keeps_nobody_else_of_the_process_from_it() -> None:
    """As gloo does when it connects: another updater of the process could not answer its peers, nor they this one."""
    timeout = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout)  # type: ignore[attr-defined]
    client = dist.TCPStore("127.0.0.1", server.port, timeout=timeout)  # type: ignore[attr-defined]
    (target, draft), peer = (join(ProcessGroup(client, 0, 2), "thing") for _ in range(2)), ProcessGroup(server, 1, 2)
    waiting = threading.Thread(target=target.own.wait, args=(["open/1"], timedelta(seconds=2)))
    waiting.start()
    time.sleep(0.1)  # if it waits later, this test shows nothing, but does not fail
    begun_s = time.monotonic()
    draft.put("open/0", "here")
    took_s = time.monotonic() - begun_s
    join(peer, "thing").put("open/1", "here")
    waiting.join()
    assert took_s < 1.5


@given(st.integers(1, 6), st.data())
def test_those_who_did_not_come_are_named(num_ranks: int, data: st.DataObject) -> None:
    """All of them, and how many of the kind each has made, if it is another number."""
    boards = [join(group, "thing") for group in stateless_groups(num_ranks)]
    absent = data.draw(st.sets(st.integers(1, num_ranks - 1))) if num_ranks > 1 else set()
    twice = {rank for rank in absent if rank % 2}
    for rank, board in enumerate(boards):
        if rank not in absent:
            board.put(f"open/{rank}", str(rank))
    for rank in twice:
        join(ProcessGroup(boards[rank].shared, rank, num_ranks), "thing")
    if not absent:
        assert gather(boards[0], "open", "0", 0) == [str(rank) for rank in range(num_ranks)]
        return
    with pytest.raises(OpenTimeout) as caught:
        gather(boards[0], "open", "0", 0)
    assert (caught.value.missing, caught.value.rank, caught.value.timeout_s) == (tuple(sorted(absent)), 0, 0)
    assert all((f"rank {rank} has made 2" in str(caught.value)) is (rank in twice) for rank in absent)


def use_every_kind(world: WorldRank) -> list[str]:
    """Use groups of each kind with all that joins one; return what becomes of ranks that are not in it."""
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no other
    order = {2: 0, 1: 1}
    be_on_host(0)
    kinds = {
        "sub": dist.new_group([1, 2]),
        "unsorted": dist.new_group([2, 1], sort_ranks=False),
        "local": dist.new_group([2, 1], use_local_synchronization=True) if world.rank else NOT_THIS_ONE,
        "stateless": ProcessGroup(PrefixStore("engine", store), order.get(world.rank, 2), 2),
    }
    said = []
    for kind, group in kinds.items():
        for make in (TorchDistTransport, CopyEngineTransport, HybridTransport):
            memory = SharedMemory()
            options = {} if make is TorchDistTransport else {"memory": lambda _: memory}  # noqa: B023 - called in here
            try:
                transport = make(group, **options)  # type: ignore[arg-type]
            except NotAMember as error:
                said.append(f"{kind}: {error}")
                continue
            if kind in ("unsorted", "stateless"):
                assert transport.rank == order[world.rank]
            use = check_transport if kind == "stateless" else hold_a_round
            anyio.run(partial(use, transport, device=memory, num_exchanges=1))
        if world.rank:
            load = anyio.run(load_of, group)
            assert load == ExpertLoad.from_counts([[2]]), kind
            assert EPTopology.from_group(group, 5) == EPTopology(2, 1, 5), kind
    return said


async def hold_a_round(transport: Transport, *, device: CpuDevice, num_exchanges: int) -> None:
    """Open a transport, and let its ranks give their numbers."""
    weights = ExpertWeights({0: [device.allocate(8).view(2, 4)]})
    control = await transport.open(device, ThreadWorkers(), weights, control_timeout_s=30)
    for _ in range(num_exchanges):
        assert await hold_round(control, [transport.rank]) == [[0], [1]]
    await transport.aclose()


async def load_of(group: ProcessGroup) -> ExpertLoad:
    """Record a token on each rank; return the load of all."""
    window = LoadWindow(1, 1, 1)
    window.record(0, torch.zeros(1, dtype=torch.int64))
    window.advance()
    load_group = await GlooLoadGroup.open(group)
    try:
        return await window.gather(load_group)
    finally:
        load_group.close()


def test_groups_of_every_kind() -> None:
    """Of some ranks, in any order, made by some of them only, and unknown to torch."""
    outsider, *members = run_world(use_every_kind, 3)
    assert members == [[]] * 2
    assert [text.split(":")[0] for text in outsider] == ["sub"] * 3 + ["unsorted"] * 3 + ["local"] * 3 + [
        "stateless"
    ] * 3
