"""What users' tests and ours share: worlds of processes, a transport's conformance, stages of a set duration."""

from async_eplb.testing.processes import World, WorldRank, run_world
from async_eplb.testing.transport import check_transport
from async_eplb.testing.workers import ScheduledWorkers

__all__ = ["ScheduledWorkers", "World", "WorldRank", "check_transport", "run_world"]
