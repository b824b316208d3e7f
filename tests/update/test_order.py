"""The order of events when ranks work at different speeds, read from one log of all of them."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
import structlog
import trio
import trio.testing
from structlog.testing import LogCapture
from support.helpers import memory_world, together

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import MemorySchedule
from async_eplb.workers import Workers

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
NUM_LAYERS = 6
OLD, NEW = (ExpertPlacement.from_mapping([row] * NUM_LAYERS) for row in ([0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]))
"""All copies stay on their rank, so that no exchange makes a fast rank wait for a slow one."""


def log_of_an_update(
    durations_s: list[dict[str, float]], depth: int, cancel_rank_0_after_s: float | None = None
) -> list[dict[str, Any]]:
    """Return what all ranks log, in the order in which they do, on a virtual clock.

    :param durations_s: of each rank, kind of work → seconds
    """
    capture = LogCapture()
    logger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG)
    )
    workers: Iterator[Workers] = map(ScheduledWorkers, durations_s)

    async def update() -> None:
        async with memory_world(
            OLD,
            TOPOLOGY,
            schedule=MemorySchedule(control_s=0.01),
            options=UpdateOptions(staging_depth=depth),
            workers=lambda: next(workers),
            loggers=[logger] * TOPOLOGY.num_ranks,
        ) as (first, *others):

            async def update_rank_0() -> None:
                with anyio.move_on_after(cancel_rank_0_after_s):
                    await first.updater.update(NEW)

            await together([update_rank_0, *(partial(rank.updater.update, NEW) for rank in others)])

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    return [dict(entry) for entry in capture.entries]


def positions(log: list[dict[str, Any]], event: str) -> dict[tuple[int, int], int]:
    """Return (layer, rank) → place in the log, for events of layers."""
    return {(entry["layer"], entry["rank"]): place for place, entry in enumerate(log) if entry["event"] == event}


@pytest.mark.parametrize("seed", range(12))
def test_no_layer_is_committed_before_it_is_staged_everywhere(seed: int) -> None:
    """However fast one rank is and however slow another."""
    rng = np.random.default_rng(seed)
    durations_s = [
        {kind: float(rng.choice([0.0, 0.1, 1.0])) for kind in ("plan", "transfer", "commit")}
        for _ in range(TOPOLOGY.num_ranks)
    ]
    log = log_of_an_update(durations_s, depth=4)
    staged, committed = (positions(log, f"eplb.layer.{what}") for what in ("transferred", "committed"))
    assert len(staged) == len(committed) == NUM_LAYERS * TOPOLOGY.num_ranks
    for layer in range(NUM_LAYERS):
        last_staged = max(staged[layer, rank] for rank in range(TOPOLOGY.num_ranks))
        first_committed = min(committed[layer, rank] for rank in range(TOPOLOGY.num_ranks))
        assert last_staged < first_committed


@pytest.mark.parametrize("cancel_after_s", [None, 5.5], ids=["to the end", "too late to cancel"])
def test_no_rank_finishes_before_all_have_committed(cancel_after_s: float | None) -> None:
    """When an update returns, every layer is new on every rank."""
    log = log_of_an_update([{"commit": 1.0}, {}, {}], depth=NUM_LAYERS, cancel_rank_0_after_s=cancel_after_s)
    finished = [place for place, entry in enumerate(log) if entry["event"] == "eplb.update.finished"]
    assert len(finished) == TOPOLOGY.num_ranks
    assert max(positions(log, "eplb.layer.committed").values()) < min(finished)
