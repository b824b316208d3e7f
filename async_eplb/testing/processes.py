"""Worlds of real processes on this machine, connected over the loopback interface."""

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
    """What a process of a world knows of itself; its torch.distributed world group is initialised.

    :param send: passes a picklable message to ``on_message`` of the process that runs the world
    """

    rank: int
    num_ranks: int
    send: Callable[[object], None]


def take_gpu(world: WorldRank) -> torch.device:
    """Make a GPU this process's current device and return it. Ranks beyond the number of GPUs share them."""
    if torch.cuda.device_count() < world.num_ranks:
        share_gpu(world.rank)
    device = torch.device("cuda", world.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_gpu(rank: int) -> None:
    """Let NCCL run in this process although another rank has the same GPU; call it before its first communicator.

    NCCL refuses two ranks of one host on one GPU. So this rank is a host of its own, and hosts talk over loopback.
    """
    os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def run_world(
    function: Callable[Concatenate[WorldRank, P], T],
    num_ranks: int,
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """Run ``function(world_rank, *args, **kwargs)`` in ``num_ranks`` processes and return their results, by rank.

    The processes find each other through a file and talk gloo over loopback; nothing listens elsewhere. If one
    fails, the others are ended.

    :param function: importable, as are its arguments and its result picklable
    :raises WorldError: with the traceback of the first process that failed
    """
    return World(num_ranks).run(function, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class World:
    """How a world of processes is run.

    :param num_ranks: processes
    :param timeout_s: after which all processes are ended
    :param on_message: called here, in the calling thread, with (rank, message) for each ``WorldRank.send``
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
                with _interrupts_held_back():
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
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C take effect after the body only. Processes started in it never see one: their parent ends them.

    They inherit the mask. The handler is for this process, in which other threads may take the signal.
    """
    held: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    handled_here = threading.current_thread() is threading.main_thread() and handler is not None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if handled_here:
        signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handled_here:
            signal.signal(signal.SIGINT, handler)
    if held:
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
            connection.send(("error", traceback.format_exc()))  # before peers fail because this one leaves
            raise
        finally:
            dist.destroy_process_group()
        connection.send(("result", result))
    except BaseException:  # noqa: BLE001 - reported to the parent, which raises it
        connection.send(("error", traceback.format_exc()))


def _die_with_owner() -> None:
    """Let SIGIO, whose default is to terminate, tell of the end of the process that started the world.

    The pipe that stands for it (``multiprocessing.parent_process().sentinel``) then has no writer any more.
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
