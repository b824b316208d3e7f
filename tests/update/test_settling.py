"""An update waits for all work that it started, also when callers are cancelled: it writes to staging until then."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from async_eplb import UpdateOptions
from async_eplb.errors import BrokenTransport
from async_eplb.update.stages import LayerStages


@dataclass
class Pull:
    """An exchange whose wait begins at a checkpoint, as work in threads does, and ends when its copies have ended."""

    error: Exception | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    num_waits: int = 0

    async def start(self) -> None:
        pass

    async def wait(self, timeout_s: float) -> None:
        assert timeout_s > 0
        await anyio.lowlevel.checkpoint()
        self.num_waits += 1
        if self.error is not None and self.num_waits == 1:
            raise self.error
        await self.ended.wait()


def stages_of(*pulls: Pull) -> tuple[LayerStages, Any]:
    """Return stages that have nothing to do with anything else, and a layer with these parts."""
    nothing: Any = None
    rank: Any = SimpleNamespace(options=UpdateOptions())
    stages = LayerStages(rank, update=nothing, transport=nothing, journal=nothing)
    return stages, SimpleNamespace(hops=[SimpleNamespace(pending=list(pulls))])


async def settles_late(stages: LayerStages, pulls: list[Pull]) -> bool:
    """Return whether settling ends after the last pull has, and not before."""
    settled = anyio.Event()

    async def settle() -> None:
        await stages.settle()
        settled.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(settle)
        early = []
        for pull in pulls:
            await anyio.wait_all_tasks_blocked()
            early.append(settled.is_set())
            pull.ended.set()
        await settled.wait()
    return not any(early)


@pytest.mark.anyio
async def test_a_receive_that_is_cancelled_before_it_waits() -> None:
    """Its copies are under way all the same."""
    pulls = [Pull(), Pull()]
    stages, layer = stages_of(*pulls)
    await stages.start(layer)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await stages.receive(layer, 0)
    assert scope.cancelled_caught
    assert [pull.num_waits for pull in pulls] == [0, 0]
    assert await settles_late(stages, pulls)


@pytest.mark.anyio
async def test_a_receive_that_fails() -> None:
    """The parts behind it, which nobody asked for, have begun as well."""
    pulls = [Pull(BrokenTransport("no luck", rank=0)), Pull()]
    stages, layer = stages_of(*pulls)
    await stages.start(layer)
    with pytest.raises(BrokenTransport, match="no luck"):
        await stages.receive(layer, 0)
    assert await settles_late(stages, pulls)


@pytest.mark.anyio
async def test_what_has_arrived_is_not_waited_for_again() -> None:
    """Nor is there anything to wait for then."""
    pull = Pull()
    pull.ended.set()
    stages, layer = stages_of(pull)
    await stages.start(layer)
    await stages.receive(layer, 0)
    await stages.settle()
    assert pull.num_waits == 1
