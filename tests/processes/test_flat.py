"""Hundreds of updates with a fault in every fifth leave no thread, task, socket or memory behind."""

import asyncio
import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import create_task_group
from support.helpers import MemoryRank, assert_same_layer, memory_world, on_all, two_placements, until

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, MemoryTransport, UpdateOptions
from async_eplb.errors import CommitFailed
from async_eplb.transport import MemorySchedule
from async_eplb.workers import ThreadWorkers

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
OPTIONS = UpdateOptions(transfer_timeout_s=1.5, control_timeout_s=3.0, verify="checksum")
SCHEDULE = MemorySchedule(control_s=0.001)
NUM_UPDATES = 200
NUM_LAYERS = 3
_WARM = 80
_ENDS_WITHIN_S = 10.0
"""Worker threads are asked to end with their workers and event loop, and not waited for."""

Ranks = list[MemoryRank]


async def update(ranks: Ranks, new: ExpertPlacement) -> list[Any]:
    """Update on all ranks."""
    return await on_all(ranks, lambda u: u.update(new))


async def recover(ranks: Ranks) -> None:
    """Recover all ranks, over new transports."""
    transports = MemoryTransport.world(len(ranks), SCHEDULE)
    outcomes = await on_all(ranks, ExpertUpdater.recover, transports)
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    ranks[:] = [replace(rank, transport=transport) for rank, transport in zip(ranks, transports, strict=True)]


async def cancel(ranks: Ranks, new: ExpertPlacement) -> None:
    """One caller goes away."""
    async with create_task_group() as tasks:
        for rank in ranks[1:]:
            tasks.start_soon(update, [rank], new)
        with anyio.move_on_after(0.004):
            await ranks[0].updater.update(new)


async def abort(ranks: Ranks, new: ExpertPlacement) -> None:
    """A transport breaks under the update."""
    async with create_task_group() as tasks:
        tasks.start_soon(update, ranks, new)
        await anyio.sleep(0.004)
        ranks[1].transport.abort()
    await recover(ranks)


async def fail_first_copy(ranks: Ranks, new: ExpertPlacement) -> None:
    """A commit fails on one rank while the other waits for its next layer."""
    await _fail_copy(ranks, new, layer=0)


async def fail_last_copy(ranks: Ranks, new: ExpertPlacement) -> None:
    """A commit fails on one rank when nothing is under way any more."""
    await _fail_copy(ranks, new, layer=NUM_LAYERS - 1)


async def _fail_copy(ranks: Ranks, new: ExpertPlacement, *, layer: int) -> None:
    table = ranks[1].updater.expert_map
    publish, calls = table.publish, iter(range(NUM_LAYERS))

    def fail_once(*arguments: Any) -> None:
        if next(calls, None) == layer:
            raise OSError("no luck")
        publish(*arguments)

    table.publish = fail_once  # type: ignore[method-assign, assignment]
    outcomes = await on_all(ranks, lambda u: u.update(new))
    assert isinstance(outcomes[1], CommitFailed)
    del table.publish
    await recover(ranks)


async def lose_a_rank(ranks: Ranks, new: ExpertPlacement) -> None:
    """All ranks give each other up."""
    for rank in ranks:
        rank.transport.die()
    await until(lambda: all("lost" in repr(rank.updater) for rank in ranks))
    await recover(ranks)
    await update(ranks, new)


FAULTS: tuple[Callable[[Ranks, ExpertPlacement], Awaitable[None]], ...] = (
    cancel,
    abort,
    fail_last_copy,
    lose_a_rank,
    cancel,
    abort,
    fail_first_copy,
    lose_a_rank,
)


def worker_threads() -> list[threading.Thread]:
    """Return the threads of updaters and of the event loop."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("eplb-", "AnyIO"))]


async def census() -> dict[str, int]:
    """Count what could be left behind."""
    gc.collect()
    workers = len(worker_threads())
    return {
        "threads": threading.active_count() - workers,
        "workers": workers,  # idle ones end after a while, and are made anew
        "tasks": len(asyncio.all_tasks()),
        "files": await anyio.to_thread.run_sync(lambda: len(os.listdir("/proc/self/fd"))),  # noqa: PTH208 - names only
        "blocks": sys.getallocatedblocks(),
        "bytes": _allocated_bytes(),
    }


class _Allocated(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _allocated_bytes() -> int:
    """Return what ``malloc`` has given out: tensors and large objects. Python's small ones are counted as blocks."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Allocated
    allocated = libc.mallinfo2()
    return int(allocated.uordblks + allocated.hblkhd)


@pytest.mark.timeout(240)
def test_nothing_is_left_behind(
    record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Between update 80 and update 200."""
    caplog.set_level(logging.CRITICAL)  # pytest would keep what each fault logs
    old, new = two_placements(TOPOLOGY, NUM_LAYERS, num_experts=5)

    async def run() -> list[dict[str, int]]:
        counts = []
        async with memory_world(old, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS, workers=ThreadWorkers) as ranks:
            for number in range(1, NUM_UPDATES + 1):
                target = new if number % 2 else old
                if number % 5 == 0:
                    await FAULTS[number // 5 % len(FAULTS)](ranks, target)
                else:
                    assert not [each for each in await update(ranks, target) if isinstance(each, Exception)]
                if number in {_WARM, NUM_UPDATES}:
                    await update(ranks, target)
                    assert_same_layer(ranks, target)
                    counts.append(await census())
        return counts

    first, last = asyncio.run(run())
    record_property("census", (first, last))
    print(first, last, sep="\n")  # noqa: T201 - the numbers are the point
    assert (first["threads"], first["tasks"]) == (last["threads"], last["tasks"])
    assert last["workers"] <= first["workers"] + 2
    assert abs(last["files"] - first["files"]) <= 2
    assert last["blocks"] - first["blocks"] < 1_000
    assert last["bytes"] - first["bytes"] < 300_000
    gc.collect()
    workers = worker_threads()
    for worker in workers:
        worker.join(_ENDS_WITHIN_S)
    assert not [worker for worker in workers if worker.is_alive()]
