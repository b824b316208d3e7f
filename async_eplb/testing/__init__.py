"""Helpers for tests, users' and ours: worlds of processes, a conformance check of transports, work of set duration."""

from async_eplb.testing.processes import World, WorldRank, run_world
from async_eplb.testing.transport import check_transport
from async_eplb.testing.workers import ScheduledWorkers

__all__ = ["ScheduledWorkers", "World", "WorldRank", "check_transport", "run_world"]
