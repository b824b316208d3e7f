"""Calls of the serving thread inside ``step()`` while an update goes on: commit copies, and nothing that waits."""

import sys
import time
from collections import Counter
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import anyio
import numpy as np
import pytest
import torch
import torch.distributed as dist

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    LayerCommit,
    SyncUpdater,
    TorchDistTransport,
    UpdateOptions,
    plan_layer,
)
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.sample_model import SampleModel, random_placement

NUM_LAYERS, NUM_EXPERTS = 4, 9
MODEL = SampleModel(hidden=64, intermediate=32)
NUM_MAPS = 4
"""Maps of a layer that are published with it."""

HARMLESS = {
    *("builtins", "_asyncio"),
    *("time.perf_counter", "torch.is_grad_enabled", "torch._C._set_grad_enabled"),
    *(
        "list.append",
        "deque.append",
        "dict.values",
        "_bisect.bisect_left",
        "set.add",
        "object.__new__",
        "ContextVar.get",
        "coroutine.send",
    ),
}
"""C functions that neither wait nor communicate: whole modules, or one by one."""


@dataclass(frozen=True)
class Outcome:
    """The calls of one rank.

    :param in_steps: C functions called inside ``step()``, by name
    :param in_passes: likewise in the forward passes, which communicate
    """

    num_steps: int
    num_decisions: int
    num_fence_waits: int
    num_layers_moved: int
    in_steps: Counter[str]
    in_passes: Counter[str]


class Watch:
    """Counts the C functions that a thread calls while it is watched: all that can wait are among them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> None:
        sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, _frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is not sys.setprofile:
            owner = getattr(function, "__module__", None) or ""
            self.calls[f"{owner}.{function.__qualname__}".removeprefix(".")] += 1

    def of(self, coroutine: Coroutine[Any, Any, None]) -> "WatchedCoroutine":
        """Watch a coroutine, and not the tasks that run while it waits."""
        return WatchedCoroutine(self, coroutine)


class WatchedCoroutine:
    """Awaits a coroutine under a watch."""

    def __init__(self, watch: Watch, coroutine: Coroutine[Any, Any, None]) -> None:
        self._watch = watch
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        sent = None
        while True:
            try:
                with self._watch:
                    waited_for = self._coroutine.send(sent)
            except StopIteration:
                return
            sent = yield waited_for


class Serving:
    """One rank of an engine, whose forward pass is a collective."""

    def __init__(self, world: WorldRank) -> None:
        self.rank = world.rank
        self.topology = EPTopology(world.num_ranks, 1, 4)
        rng = np.random.default_rng(0)
        physical = self.topology.num_physical_experts
        self.old, self.new = (random_placement(rng, NUM_LAYERS, physical, NUM_EXPERTS) for _ in range(2))
        self.tensors = MODEL.weights(self.old, self.topology, world.rank)
        self.steps, self.passes = Watch(), Watch()
        self.arguments = (ExpertWeights(self.tensors), self.old, self.topology)
        self.options: dict[str, Any] = {
            "rank": world.rank,
            "transport": TorchDistTransport(),
            "options": UpdateOptions(lead=32),
            "on_commit": self.note_commit,
        }
        self.num_steps = 0
        self.boundaries: set[int] = set()

    def note_commit(self, _commit: LayerCommit) -> None:
        """Remember the boundary."""
        self.boundaries.add(self.num_steps)

    def pass_is_last(self, *, done: bool) -> bool:
        """Make a forward pass; return whether all ranks are done."""
        self.num_steps += 1
        flag = torch.tensor([int(done)])
        with self.passes:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        time.sleep(0.002)
        return bool(flag)

    def in_a_thread(self) -> Outcome:
        """Step from a plain thread, as a synchronous engine does."""
        with SyncUpdater(*self.arguments, **self.options) as updater:
            handle = updater.begin(self.new)
            done = False
            while not done:
                with self.steps:
                    updater.step()
                done = self.pass_is_last(done=handle.done)
            handle.wait()
            return self.outcome(updater.updater)

    async def in_the_loop(self) -> Outcome:
        """Step as a task, as an asynchronous engine does."""
        async with ExpertUpdater(*self.arguments, **self.options) as updater:
            handle = updater.begin(self.new)
            done = False
            while not done:
                await self.steps.of(updater.step())
                done = await anyio.to_thread.run_sync(lambda: self.pass_is_last(done=handle.done))
            await handle.wait()
            return self.outcome(updater)

    def outcome(self, updater: ExpertUpdater) -> Outcome:
        """Return what was called."""
        assert MODEL.wrong_slots(self.tensors, self.new, self.topology, self.rank) == []
        return Outcome(
            num_steps=self.num_steps,
            num_decisions=len(self.boundaries),
            num_fence_waits=updater.statistics().num_fence_waits,
            num_layers_moved=num_layers_moved(self.old, self.new, self.topology, self.rank),
            in_steps=self.steps.calls,
            in_passes=self.passes.calls,
        )


def num_layers_moved(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology, rank: int) -> int:
    """Return the layers in which some slot of this rank gets other weights: each is one list of copies."""
    rows = zip(old.physical_to_logical_map, new.physical_to_logical_map, strict=True)
    return sum(bool(plan_layer(*row, topology, rank).staged_slots) for row in rows)


def serve(world: WorldRank, *, in_a_thread: bool) -> Outcome:
    """Be one rank."""
    serving = Serving(world)
    return serving.in_a_thread() if in_a_thread else anyio.run(serving.in_the_loop)


@pytest.mark.parametrize("in_a_thread", [True, False], ids=["in a thread", "in the loop"])
def test_inside_a_step_nothing_communicates_or_waits(in_a_thread: bool) -> None:  # noqa: FBT001
    """Locks that nobody holds for long, commit copies, and a byte to wake the loop, with layers or times of passes."""
    for outcome in run_world(serve, 4, in_a_thread=in_a_thread):
        assert outcome.num_fence_waits == 0
        calls = {
            name: count
            for name, count in outcome.in_steps.items()
            if name not in HARMLESS and name.split(".")[0] not in HARMLESS
        }
        assert calls.pop("torch._VariableFunctionsClass._foreach_copy_") == outcome.num_layers_moved
        assert calls.pop("Tensor.copy_") == NUM_LAYERS * NUM_MAPS
        num_times_handed_over = calls.pop("socket.send") - outcome.num_decisions
        assert num_times_handed_over in (0, 1)  # times of passes, by a step after the update
        assert calls.pop("RLock.__enter__") == calls.pop("RLock.__exit__") == outcome.num_steps
        assert calls == {}
        assert sum(count for name, count in outcome.in_passes.items() if name.endswith(".wait")) == outcome.num_steps
