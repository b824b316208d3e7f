"""Moments of an update, in virtual time, at which tests cancel or leave it: one for each state of it."""

import logging
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import anyio
import structlog

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.events.emit import Logger
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import LaunchRule, MemorySchedule
from support.helpers import MemoryRank, memory_ranks, memory_world, on_all, two_placements

WORK_S = {"plan": 0.003, "transfer": 0.002, "commit": 0.005, "finish": 0.004}


@dataclass(frozen=True)
class SlowUpdate:
    """An update in memory of which every part takes time: equal ones pass through equal states at equal times."""

    topology: EPTopology
    num_layers: int = 5
    launch_rule: LaunchRule = LaunchRule.AT_ONCE
    options: UpdateOptions | None = None

    @cached_property
    def placements(self) -> tuple[ExpertPlacement, ExpertPlacement]:
        """The old and the new one."""
        return two_placements(self.topology, self.num_layers, num_experts=6)

    def ranks(self, loggers: Sequence[Logger] | None = None) -> list[MemoryRank]:
        """Make an updater for each rank, at the old placement; none is entered yet."""
        return memory_ranks(self.placements[0], self.topology, **self._setting(), loggers=loggers)

    def world(self, loggers: Sequence[Logger] | None = None) -> AbstractAsyncContextManager[list[MemoryRank]]:
        """Open an updater for each rank, at the old placement."""
        return memory_world(self.placements[0], self.topology, **self._setting(), loggers=loggers)

    async def moments(self) -> list[float]:
        """Run the update undisturbed; return moments of it, in seconds from its beginning, in order.

        They are the beginning, the times between any two events of any ranks, and those at which an event of a layer
        is logged for the first time. The last comes after the end.
        """
        logged: list[tuple[float, tuple[Any, ...]]] = []

        def note(_logger: object, _level: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
            logged.append((anyio.current_time(), (event["event"], event.get("layer"))))
            raise structlog.DropEvent

        wrapper = structlog.make_filtering_bound_logger(logging.DEBUG)
        loggers = [structlog.wrap_logger(None, processors=[note], wrapper_class=wrapper)] * self.topology.num_ranks
        async with self.world(loggers) as ranks:
            start = anyio.current_time()
            await on_all(ranks, lambda u: u.update(self.placements[1]))
        times = sorted({at - start for at, _ in logged})
        first = {kind: at - start for at, kind in reversed(logged)}
        between = [(before + after) / 2 for before, after in pairwise([0.0, *times])]
        return sorted({0.0, *between, *first.values(), 2 * times[-1]})

    def _setting(self) -> dict[str, Any]:
        schedule = MemorySchedule(
            exchange_s=0.003,
            relay_s=0.003,
            message_jitter_s=0.004,
            control_s=0.002,
            control_jitter_s=0.001,
            launch_rule=self.launch_rule,
        )
        return {"schedule": schedule, "options": self.options, "workers": partial(ScheduledWorkers, WORK_S)}


async def until_idle(rank: MemoryRank) -> None:
    """Wait until no update of a rank runs."""
    while rank.updater.statistics().updating:  # noqa: ASYNC110 - in virtual time this costs nothing
        await anyio.sleep(0.001)
