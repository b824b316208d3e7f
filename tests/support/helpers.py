"""Worlds inside one process, for tests."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import anyio
import numpy as np
import torch
import trio.testing
from anyio import Event, create_task_group
from anyio.abc import TaskStatus
from torch import Tensor

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    LayerCommit,
    MapTables,
    MemoryTransport,
    UpdateOptions,
)
from async_eplb.events.emit import Logger
from async_eplb.fuzz.loop import SimulatedLoop, run
from async_eplb.staging import BufferState
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import MemorySchedule
from async_eplb.weights import Slots
from async_eplb.workers import Workers

TINY = SampleModel(hidden=8, intermediate=4)


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test under a clock that is ahead as soon as nothing is left to do, so that no load makes it late."""

    @wraps(test)
    def run_test(*arguments: object, **values: object) -> None:
        run(SimulatedLoop(None), partial(test, *arguments, **values))

    return run_test


def with_virtual_time(backend: str) -> tuple[str, dict[str, Any]]:
    """Return what the ``anyio_backend`` fixture may return: an event loop under such a clock."""
    if backend == "trio":
        return backend, {"clock": trio.testing.MockClock(autojump_threshold=0)}
    return backend, {"loop_factory": partial(SimulatedLoop, None)}


@dataclass(frozen=True)
class MemoryRank:
    """One rank of a world in memory."""

    updater: ExpertUpdater
    tensors: Mapping[int, Sequence[Any]]
    """Row → tensors, or lists of them."""
    transport: MemoryTransport

    def assert_consistent(self) -> None:
        """Weights, maps and placement of every layer agree, and staging is free but for what a failed update kept."""
        updater, placement = self.updater, self.updater.placement
        assert TINY.wrong_slots(self.tensors, placement, updater.topology, updater.rank) == []
        published = updater.expert_map.physical_to_logical_map
        assert published.tolist() == placement.physical_to_logical_map.tolist()
        kept = [layer.buffer for layer in updater.failed.kept] if updater.failed else []
        assert all(buffer.state is BufferState.FREE for buffer in updater.staging if buffer not in kept)


def memory_ranks(
    placement: ExpertPlacement,
    topology: EPTopology,
    *,
    schedule: MemorySchedule | None = None,
    options: UpdateOptions | Sequence[UpdateOptions] | None = None,
    workers: Callable[[], Workers] = ScheduledWorkers,
    loggers: Sequence[Logger] | None = None,
    on_commit: Sequence[Callable[[LayerCommit], None]] = (),
    tables: Sequence[MapTables] = (),
    lay_out: Callable[[Mapping[int, list[Tensor]]], Mapping[int, Sequence[Slots]]] = lambda tensors: tensors,
) -> list[MemoryRank]:
    """Make an updater for each rank; none is entered yet.

    ``lay_out`` gives the live weights another layout than one block for each tensor.
    """
    ranks = []
    for rank, transport in enumerate(MemoryTransport.world(topology.num_ranks, schedule)):
        tensors = lay_out(TINY.weights(placement, topology, rank))
        updater = ExpertUpdater(
            ExpertWeights(tensors),
            placement,
            topology,
            rank=rank,
            transport=transport,
            options=options[rank] if isinstance(options, Sequence) else options,
            workers=workers(),
            logger=loggers[rank] if loggers else None,
            on_commit=on_commit[rank] if on_commit else None,
            tables=tables[rank] if tables else None,
        )
        ranks.append(MemoryRank(updater, tensors, transport))
    return ranks


@asynccontextmanager
async def memory_world(
    placement: ExpertPlacement,
    topology: EPTopology,
    *,
    schedule: MemorySchedule | None = None,
    options: UpdateOptions | Sequence[UpdateOptions] | None = None,
    workers: Callable[[], Workers] = ScheduledWorkers,
    loggers: Sequence[Logger] | None = None,
    on_commit: Sequence[Callable[[LayerCommit], None]] = (),
    tables: Sequence[MapTables] = (),
    lay_out: Callable[[Mapping[int, list[Tensor]]], Mapping[int, Sequence[Slots]]] = lambda tensors: tensors,
) -> AsyncIterator[list[MemoryRank]]:
    """Open an updater for each rank; all leave at once, as processes do."""
    ranks = memory_ranks(
        placement,
        topology,
        schedule=schedule,
        options=options,
        workers=workers,
        loggers=loggers,
        on_commit=on_commit,
        tables=tables,
        lay_out=lay_out,
    )
    stop = Event()

    async def live(rank: MemoryRank, *, task_status: TaskStatus[None]) -> None:
        async with rank.updater:
            task_status.started()
            await stop.wait()

    async with create_task_group() as tasks:
        for rank in ranks:
            await tasks.start(live, rank)
        try:
            yield ranks
        finally:
            stop.set()


async def until(holds: Callable[[], bool]) -> None:
    """Return once something holds; it is looked at after each millisecond, which takes no time under virtual clocks."""
    while not holds():  # noqa: ASYNC110 - what is waited for has no event
        await anyio.sleep(0.001)


async def together(calls: Sequence[Callable[[], Awaitable[object]]]) -> list[Any]:
    """Run one call for each rank at once; return results and exceptions, by rank."""
    outcomes: list[Any] = [None] * len(calls)

    async def run(index: int) -> None:
        try:
            outcomes[index] = await calls[index]()
        except Exception as error:  # noqa: BLE001 - an outcome like any other
            outcomes[index] = error

    async with create_task_group() as tasks:
        for index in range(len(calls)):
            tasks.start_soon(run, index)
    return outcomes


async def on_all(
    ranks: Iterable[MemoryRank],
    call: Callable[..., Awaitable[object]],
    *by_rank: Iterable[Any],
) -> list[Any]:
    """Run one call with the updater of each rank at once; return results and exceptions, by rank.

    ``by_rank`` gives the call further arguments: of each, one for every rank.
    """
    arguments = zip((rank.updater for rank in ranks), *by_rank, strict=True)
    return await together([partial(call, *values) for values in arguments])


def two_placements(
    topology: EPTopology, num_layers: int, num_experts: int, seed: int = 0
) -> tuple[ExpertPlacement, ExpertPlacement]:
    """Draw an old and a new placement that differ in every layer."""
    rng = np.random.default_rng(seed)
    physical = topology.num_physical_experts
    old, new = (random_placement(rng, num_layers, physical, num_experts) for _ in range(2))
    assert len(new.changed_layers(old)) == num_layers
    return old, new


def float_weights(num_slots: int = 2, rows: int = 1) -> dict[int, list[Tensor]]:
    """Return small weights of one tensor a row."""
    return {row: [torch.zeros(num_slots, 4)] for row in range(rows)}


def assert_same_layer(ranks: list[MemoryRank], old: ExpertPlacement) -> int:
    """All ranks have committed the same first layers; return how many."""
    placements = {rank.updater.placement for rank in ranks}
    assert len(placements) == 1
    for rank in ranks:
        rank.assert_consistent()
    changed = placements.pop().changed_layers(old)
    assert changed == tuple(range(len(changed)))
    return len(changed)
