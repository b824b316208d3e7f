"""Objects of one event loop say so elsewhere (rule 25), and go on working where they belong."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isfunction
from typing import Any

import anyio
import pytest
from anyio import to_thread
from support.helpers import TINY, two_placements
from support.loads import local_group

from async_eplb import (
    EPTopology,
    ExpertUpdater,
    ExpertWeights,
    Global,
    LoadWindow,
    MemoryTransport,
    Rebalancer,
    RebalanceTerms,
    UpdateHandle,
)
from async_eplb.errors import ClosedUpdater, UpdateAborted, UpdateCancelled, WrongEventLoop

TOPOLOGY = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
OLD, NEW = two_placements(TOPOLOGY, 3, num_experts=4)
TERMS = RebalanceTerms(expert_nbytes=100, link_bytes_per_s=1e9, layer_step_s=1e-3, horizon_steps=1000)


def new_updater() -> ExpertUpdater:
    """Make an updater of one rank."""
    weights = ExpertWeights(TINY.weights(OLD, TOPOLOGY, 0))
    return ExpertUpdater(weights, OLD, TOPOLOGY, rank=0, transport=MemoryTransport.world(1)[0])


async def enter(context: Any) -> None:
    """Enter and leave a context manager."""
    async with context:
        pass


async def call(function: Callable[[], object]) -> None:
    """Call what is not asynchronous."""
    function()


def of_updater(
    touch: Callable[[ExpertUpdater], Awaitable[object]], updater: ExpertUpdater, *_others: object
) -> Awaitable[object]:
    """Touch an updater."""
    return touch(updater)


UPDATER_TOUCHES: dict[str, Callable[[ExpertUpdater], Awaitable[object]]] = {
    "update": lambda updater: updater.update(NEW),
    "stream": lambda updater: anext(updater.stream(NEW)),
    "begin": lambda updater: call(partial(updater.begin, NEW)),
    "step": lambda updater: updater.step(),
    "idle": lambda updater: enter(updater.idle()),
    "paused": lambda updater: enter(updater.paused()),
    "rebind": lambda updater: updater.rebind(ExpertWeights(TINY.weights(OLD, TOPOLOGY, 0))),
    "recover": lambda updater: updater.recover(MemoryTransport.world(1)[0]),
    "audit": lambda updater: updater.audit(MemoryTransport.world(1)[0]),
}
FOR_ALL_THREADS = {"step_sync", "statistics"}
OTHER_TOUCHES: dict[str, Callable[[ExpertUpdater, UpdateHandle, Rebalancer], Awaitable[object]]] = {
    "leaving": lambda updater, _handle, _rebalancer: updater.__aexit__(None, None, None),
    "handle.wait": lambda _updater, handle, _rebalancer: handle.wait(),
    "handle.cancel": lambda _updater, handle, _rebalancer: call(handle.cancel),
    "demands.until_demanded": lambda updater, _handle, _rebalancer: updater.demands.until_demanded(1, due_step=None),
    "demands.until_step": lambda updater, _handle, _rebalancer: updater.demands.until_step(1),
    "calls.at_boundary": lambda updater, _handle, _rebalancer: updater.calls.at_boundary(int),
    "rebalancer.run": lambda _updater, _handle, rebalancer: rebalancer.run(),
    "rebalancer.rebalance_now": lambda _updater, _handle, rebalancer: rebalancer.rebalance_now(),
}
TOUCHES: dict[str, Callable[[ExpertUpdater, UpdateHandle, Rebalancer], Awaitable[object]]] = {
    **{name: partial(of_updater, touch) for name, touch in UPDATER_TOUCHES.items()},
    **OTHER_TOUCHES,
}
"""All that needs the updater's event loop."""


def test_all_methods_of_an_updater_are_tried() -> None:
    """Each is for its event loop, or for all threads."""
    methods = {
        name
        for kind in ExpertUpdater.__mro__
        for name, value in vars(kind).items()
        if isfunction(value) and not name.startswith("_")
    }
    assert methods == set(UPDATER_TOUCHES) | FOR_ALL_THREADS


async def refusals(updater: ExpertUpdater, handle: UpdateHandle, rebalancer: Rebalancer) -> dict[str, bool]:
    """Touch everything, and return whether it was refused for being in the wrong event loop."""
    refused = {}
    for name, touch in TOUCHES.items():
        refused[name] = False
        with anyio.move_on_after(5):
            try:
                await touch(updater, handle, rebalancer)
            except WrongEventLoop:
                refused[name] = True
    return refused


def new_rebalancer(updater: ExpertUpdater) -> Rebalancer:
    """Make a rebalancer of one rank."""
    return Rebalancer(updater, LoadWindow(3, 4, 1), Global(), group=local_group(), terms=TERMS)


@pytest.mark.anyio
@pytest.mark.parametrize("elsewhere", ["asyncio", "trio"])
async def test_another_thread_is_refused_and_the_updater_goes_on(elsewhere: str) -> None:
    """At once, in the middle of an update and for every method; then the update ends as if nothing had been."""
    async with new_updater() as updater:
        handle = updater.begin(NEW)
        touch_all = partial(anyio.run, refusals, updater, handle, new_rebalancer(updater), backend=elsewhere)
        assert await to_thread.run_sync(touch_all) == dict.fromkeys(TOUCHES, True)
        assert updater.statistics().updating
        while not handle.done:
            await to_thread.run_sync(updater.step_sync)
            await to_thread.run_sync(updater.statistics)
            await to_thread.run_sync(repr, handle)
        assert (await handle.wait()).layers == (0, 1, 2)
        assert updater.placement == NEW
        assert (await to_thread.run_sync(handle.result)).layers == (0, 1, 2)


def test_a_thread_without_an_event_loop_is_refused() -> None:
    """What does not await is refused as well."""

    async def begin_in_a_thread() -> None:
        async with new_updater() as updater:
            with pytest.raises(WrongEventLoop, match="opened in another event loop"):
                await to_thread.run_sync(updater.begin, NEW)
            handle = updater.begin(NEW)
            with pytest.raises(WrongEventLoop):
                await to_thread.run_sync(handle.cancel)
            async with updater.idle():
                await handle.wait()

    anyio.run(begin_in_a_thread)


def test_another_event_loop_of_the_same_thread_is_refused() -> None:
    """Also when the first has ended."""

    async def enter_only() -> tuple[ExpertUpdater, UpdateHandle]:
        updater = await new_updater().__aenter__()
        return updater, updater.begin(NEW)

    updater, handle = asyncio.run(enter_only())
    assert asyncio.run(refusals(updater, handle, new_rebalancer(updater))) == dict.fromkeys(TOUCHES, True)
    assert handle.done
    with pytest.raises(UpdateAborted, match="event loop of rank 0 was shut down"):
        handle.result()


def test_callbacks_of_the_event_loop_are_at_home() -> None:
    """As of a timer or a signal handler, which no task runs."""

    async def cancel_from_a_callback() -> None:
        async with new_updater() as updater, updater.idle():
            handle = updater.begin(NEW)
            asyncio.get_running_loop().call_soon(handle.cancel)
            with pytest.raises(UpdateCancelled):
                await handle.wait()

    asyncio.run(cancel_from_a_callback())


def test_before_it_is_entered_an_updater_belongs_to_no_event_loop() -> None:
    """It is refused as one that is not open."""

    async def begin() -> None:
        with pytest.raises(ClosedUpdater):
            new_updater().begin(NEW)

    anyio.run(begin)
