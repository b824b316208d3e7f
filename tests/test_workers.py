"""Blocking work in threads: in turn by kind, to its end, with the caller's context."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from contextvars import ContextVar
from functools import partial

import anyio
import pytest
from anyio import create_task_group

from async_eplb.workers import Interruptible, ThreadWorkers

WHO = ContextVar("WHO", default="nobody")

pytestmark = pytest.mark.anyio


class ExampleError(Exception):
    """What a function raises."""


async def test_functions_of_one_kind_run_in_turn_and_of_others_at_once() -> None:
    """In one daemon thread for each kind."""
    workers, order, gate = ThreadWorkers(), list[str](), threading.Event()

    def work(name: str) -> None:
        assert threading.current_thread().daemon
        order.append(f"{name} begins")
        gate.wait(10)
        order.append(f"{name} ends")

    async with create_task_group() as tasks:
        tasks.start_soon(workers.run, "a", partial(work, "first"))
        await workers.run("b", lambda: None)
        tasks.start_soon(workers.run, "a", partial(work, "second"))
        await workers.run("b", gate.set)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


async def test_results_errors_and_context_are_those_of_a_call() -> None:
    """What is raised is in no cycle of references, which would keep the memory that the function used."""
    workers = ThreadWorkers()
    WHO.set("me")
    assert await workers.run("a", WHO.get) == "me"

    def fail() -> None:
        raise ExampleError("no luck")

    gc.disable()
    try:
        with pytest.raises(ExampleError, match="no luck") as caught:
            await workers.run("a", fail)
        error = weakref.ref(caught.value)
        del caught
        await workers.run("a", lambda: None)
        assert error() is None
    finally:
        gc.enable()


async def test_a_cancelled_caller_waits_for_the_end() -> None:
    """A function that has begun is not abandoned; one that has not is not begun."""
    workers, ended = ThreadWorkers(), list[int]()

    def end_late() -> None:
        time.sleep(0.05)
        ended.append(1)

    with anyio.move_on_after(0.01):
        await workers.run("a", end_late)
    assert ended == [1]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await workers.run("a", lambda: ended.append(2))
    assert ended == [1]


async def test_threads_end_with_their_workers() -> None:
    """When nobody has them any more."""
    workers = ThreadWorkers()
    thread = await workers.run("a", threading.current_thread)
    assert thread.name == "eplb-a"
    del workers
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_loop_that_has_ended_is_told_nothing() -> None:
    """Its thread goes on, for other event loops."""
    workers, gate = ThreadWorkers(), threading.Event()

    async def abandon() -> None:
        task = asyncio.create_task(workers.run("a", lambda: gate.wait(10)))
        await workers.run("b", lambda: None)
        task.cancel()

    anyio.run(abandon)
    gate.set()
    assert anyio.run(workers.run, "a", lambda: "on") == "on"


def test_an_interruptible_function_is_a_function() -> None:
    """Who does not know of it just calls it."""
    assert Interruptible(lambda: 3, lambda: None)() == 3


PROGRAM = """
import asyncio, threading, time
from async_eplb.workers import Interruptible, ThreadWorkers

gate = threading.Event()

def block():
    print("interrupted in time" if gate.wait(60) else "forgotten")

async def main():
    tasks = [
        asyncio.create_task(workers.run("a", Interruptible(block, gate.set))),
        asyncio.create_task(workers.run("b", lambda: time.sleep(60))),
        asyncio.create_task(workers.run("c", Interruptible(lambda: time.sleep(60), lambda: 1 / 0))),
        asyncio.create_task(workers.run("d", lambda: (time.sleep(0.1), print("ended by itself")))),
    ]
    await workers.run("e", lambda: None)

workers = ThreadWorkers()
asyncio.run(main())
"""


def test_the_end_of_the_interpreter_waits_a_little_and_interrupts() -> None:
    """What ends by itself soon does, what can be interrupted is, and what can not is left to itself."""
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ended by itself", "interrupted in time"]
    assert done.stderr == ""
    assert time.monotonic() - began_s < 30
