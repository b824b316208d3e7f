"""Synchronous engines: the same updater behind blocking calls."""

import threading
from inspect import signature

from support.helpers import (
    TINY,
    two_placements,
)
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport
from async_eplb.errors import (
    EplbError,
)
from async_eplb.sync import SyncUpdater
from async_eplb.workers import ThreadWorkers


def serve_in_a_thread(
    updater: SyncUpdater,
    old: ExpertPlacement,
    new: ExpertPlacement,
    elsewhere: dict[int, list[Tensor]],
    outcome: list[object],
) -> None:
    """Be a synchronous engine: step until the update is done, then go idle, pause, and rebind weights."""
    try:
        with updater:
            handle = updater.begin(new)
            while not handle.done:
                updater.step()
            outcome.append(handle.wait().layers)
            with updater.idle():
                updater.begin(old).wait()
            with updater.paused():
                outcome.append(updater.placement == old)
                updater.rebind(ExpertWeights(elsewhere))
            outcome.append(updater.update(new).layers)
    except EplbError as error:
        outcome.append(error)


def test_synchronous_engines_use_the_same_updater() -> None:
    """One rank in plain threads: begin, step, wait, idle, paused, rebind and update work through a portal."""
    topology = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
    old, new = two_placements(topology, 3, num_experts=4)
    (transport,) = MemoryTransport.world(1)
    tensors = TINY.weights(old, topology, 0)
    updater = SyncUpdater(ExpertWeights(tensors), old, topology, rank=0, transport=transport, workers=ThreadWorkers())
    outcome: list[object] = []
    elsewhere = TINY.weights(old, topology, 0)
    thread = threading.Thread(target=serve_in_a_thread, args=(updater, old, new, elsewhere, outcome))
    thread.start()
    thread.join(30)
    assert outcome == [(0, 1, 2), True, (0, 1, 2)]
    assert TINY.wrong_slots(tensors, old, topology, 0) == TINY.wrong_slots(elsewhere, new, topology, 0) == []
    assert isinstance(updater.updater, ExpertUpdater)


def test_both_facades_have_the_same_face() -> None:
    """The same parameters, and one more; the same properties; and the methods that callers of either use."""
    plain, synchronous = (dict(signature(kind).parameters) for kind in (ExpertUpdater, SyncUpdater))
    assert synchronous.pop("backend").default == "asyncio"
    assert synchronous == plain
    properties = {name for name, value in vars(SyncUpdater).items() if isinstance(value, property)}
    internal = {"running", "failed", "staging", "outlook"}
    assert properties | internal >= {name for name, value in vars(ExpertUpdater).items() if isinstance(value, property)}
    methods = {"update", "begin", "step", "idle", "paused", "rebind", "recover", "audit", "statistics"}
    assert methods <= set(vars(SyncUpdater))
