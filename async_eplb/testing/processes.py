"""Worlds of real processes on this machine, which are connected over the loopback interface."""

import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from async_eplb.errors import WorldError

P = ParamSpec("P")
T = TypeVar("T")

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class WorldRank:
    """One process of a world, as the function that it runs sees it; torch.distributed's world group is initialised.

    :param send: sends a picklable message to ``on_message`` in the process that runs the world
    """

    rank: int
    num_ranks: int
    send: Callable[[object], None]


def take_gpu(world: WorldRank) -> torch.device:
    """Choose a GPU by rank, make it this process's current device, and return it. Surplus ranks share GPUs."""
    if torch.cuda.device_count() < world.num_ranks:
        share_gpu(world.rank)
    device = torch.device("cuda", world.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_gpu(rank: int) -> None:
    """Let NCCL run although another rank has the same GPU. Call this before the first communicator.

    NCCL refuses two ranks of one host on one GPU. So this rank poses as a host of its own, and uses loopback.
    """
    os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def run_world(
    function: Callable[Concatenate[WorldRank, P], T],
    num_ranks: int,
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """Run ``function(world_rank, *args, **kwargs)`` in ``num_ranks`` processes and return their results, by rank.

    The processes find each other through a file and use gloo over loopback; nothing listens on other interfaces. If
    one fails, the others are ended.

    :param function: must be importable; its arguments and its result must be picklable
    :raises WorldError: with the traceback of the first process that failed
    """
    return World(num_ranks).run(function, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class World:
    """A world of processes to be run.

    :param num_ranks: number of processes
    :param timeout_s: time after which all processes are ended, in seconds
    :param on_message: called with (rank, message) for each ``WorldRank.send``, in the thread that called :meth:`run`
    """

    num_ranks: int
    timeout_s: float = 300.0
    on_message: Callable[[int, object], None] = lambda _rank, _message: None

    def run(self, function: Callable[Concatenate[WorldRank, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Start the processes, wait for all of them, and return their results.

        :raises WorldError: if one fails, dies, or does not end in time
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["async_eplb.testing.processes", "async_eplb.updater"])
        resource_tracker.ensure_running()  # with the first process it would undo the signal mask
        call = pickle.dumps((function, args, kwargs))
        with tempfile.TemporaryDirectory(prefix="async-eplb-") as folder:
            processes: list[BaseProcess] = []
            connections: list[Connection] = []
            try:
                with _interrupts_delayed():
                    for rank in range(self.num_ranks):
                        here, there = context.Pipe(duplex=False)
                        setup = (rank, self.num_ranks, str(Path(folder) / "store"), self.timeout_s)
                        process = context.Process(target=_process, args=(setup, call, there), name=f"rank-{rank}")
                        process.start()
                        there.close()
                        processes.append(process)
                        connections.append(here)
                results: list[T] = self._collect(processes, connections)
                for running in processes:
                    running.join(_GRACE_S)
                return results
            finally:
                for running in processes:
                    running.kill()
                    running.join()
                for connection in connections:
                    connection.close()

    def _collect(self, processes: list[BaseProcess], connections: list[Connection]) -> list[T]:
        deadline = time.monotonic() + self.timeout_s
        results: dict[int, T] = {}
        while len(results) < self.num_ranks:
            open_ranks = {connections[rank]: rank for rank in range(self.num_ranks) if rank not in results}
            ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(open_ranks.values())
                raise WorldError(f"ranks {late} did not end within {self.timeout_s} s", rank=late[0])
            for connection in ready:
                rank = open_ranks[connection]  # type: ignore[index]
                kind, value = _received(connection, processes[rank], rank)  # type: ignore[arg-type]
                if kind == "message":
                    self.on_message(rank, value)
                elif kind == "result":
                    results[rank] = value  # type: ignore[assignment]
                else:
                    raise WorldError(f"rank {rank} failed:\n{value}", rank=rank)
        return [results[rank] for rank in range(self.num_ranks)]


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C until after the body. Processes that are started in it never get one: their parent ends them.

    They inherit the mask. The handler is for this process, in which another thread may receive the signal.
    """
    received: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    handled_here = threading.current_thread() is threading.main_thread() and handler is not None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if handled_here:
        signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handled_here:
            signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)


def _received(connection: Connection, process: BaseProcess, rank: int) -> tuple[str, object]:
    try:
        received: tuple[str, object] = connection.recv()
    except EOFError:
        process.join(_GRACE_S)
        return "error", f"the process of rank {rank} died with exit code {process.exitcode}"
    return received


def _process(setup: tuple[int, int, str, float], call: bytes, connection: Connection) -> None:
    rank, num_ranks, store_path, timeout_s = setup
    _die_with_owner()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        function, args, kwargs = pickle.loads(call)  # noqa: S301 - from the parent process
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store_path, num_ranks),  # type: ignore[attr-defined]
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        try:
            world_rank = WorldRank(rank, num_ranks, lambda message: connection.send(("message", message)))
            result = function(world_rank, *args, **kwargs)
            dist.barrier()
        except BaseException:
            connection.send(("error", traceback.format_exc()))  # before other ranks fail because this one is gone
            raise
        finally:
            dist.destroy_process_group()
        connection.send(("result", result))
    except BaseException:  # noqa: BLE001 - reported to the parent, which raises it
        connection.send(("error", traceback.format_exc()))


def _die_with_owner() -> None:
    """Terminate this process by SIGIO when the process that started the world ends.

    Then the pipe ``multiprocessing.parent_process().sentinel`` has no writer any more, which raises the signal.
    """
    owner = multiprocessing.parent_process()
    if owner is None:
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    pipe = int(owner.sentinel)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | fcntl.FASYNC)
    if not owner.is_alive():
        sys.exit("the owner of this world is gone")
