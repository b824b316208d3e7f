"""Real processes, of which one meets with an accident at an exact point of an update; the others report.

On CPUs over gloo; or on one GPU, which all ranks share as if each were a host of its own.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import (
    EPTopology,
    ExpertUpdater,
    ExpertWeights,
    Transport,
    UpdateOptions,
)
from async_eplb.agreement.ballot import Ballot
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import EplbError, RankInDoubt
from async_eplb.events.event_logger import EventLogger
from async_eplb.events.schema import LayerTransferred
from async_eplb.recovery.survivors import on_survivors
from async_eplb.testing.processes import share_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport import TRANSPORTS, PendingExchange, PreparedExchange, TransportOptions
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc
from async_eplb.workers import ThreadWorkers
from support.accidents import (
    CONTROL_TIMEOUT_S,
    LATE,
    OTHER_PLACEMENT,
    Accident,
    Report,
)
from support.shared_memory import SharedMemory

T = TypeVar("T")

MODEL = SampleModel(hidden=16, intermediate=8)
NUM_LAYERS = 4
_LONGEST_LIFE_S = 50.0
"""Time-out of a process: then it prints its stacks and ends."""
_LONGEST_DEATH_S = 10.0


class Source:
    """Holds the model's experts, and remembers which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert."""
        self.asked.append((layer, logical_expert))
        return MODEL.expert_bytes(layer, logical_expert)


def survivors_of(accident: Accident, *, timeout_s: float = 60.0) -> list[Report]:
    """Run the world; return what the survivors report."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["async_eplb.testing.processes", "async_eplb.updater", "support.faulty_world"])
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(accident.num_ranks)]
        processes = [
            context.Process(target=_process, args=(accident, rank, str(Path(folder) / "store"), ends[rank][1]))
            for rank in range(accident.num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            for _, there in ends:
                there.close()
            return [_received(ends[rank][0], timeout_s) for rank in accident.reporting]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(_LONGEST_DEATH_S)
            for here, _ in ends:
                here.close()


def _received(connection: Connection, timeout_s: float) -> Report:
    if not wait([connection], timeout=timeout_s):
        raise TimeoutError(f"a rank did not report within {timeout_s} s")
    report: Report | BaseException = connection.recv()
    if isinstance(report, BaseException):
        raise report
    return report


def _process(accident: Accident, rank: int, store_path: str, connection: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_LONGEST_LIFE_S, exit=True)
    if accident.device == "cuda":
        share_gpu(rank)
        # A client of MPS that is killed takes the server's other clients along.
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = str(Path(store_path).parent)
        torch.cuda.set_device(0)
    store = dist.FileStore(store_path, accident.num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=accident.num_ranks, timeout=timedelta(seconds=30)
    )
    try:
        connection.send(anyio.run(_Rank(accident, rank).run))
    except BaseException as error:  # noqa: BLE001 - raised by the test
        error.add_note(traceback.format_exc())
        connection.send(error)


class _Workers(ThreadWorkers):
    """Threads that come to a point of the update."""

    def __init__(self, reach: Callable[[str], None]) -> None:
        super().__init__()
        self._reach = reach
        self._phases = {"plan": "planning", "pull": "turn", "exchange": "transfer"}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        def reached() -> T:
            if kind in self._phases:
                self._reach(self._phases[kind])
            return function()

        return await super().run(kind, reached)


class _Reached:
    """A prepared exchange whose launch is a point of the update."""

    def __init__(self, prepared: PreparedExchange, reach: Callable[[str], None]) -> None:
        self._prepared = prepared
        self._reach = reach

    def launch(self) -> PendingExchange:
        self._reach("launch")
        return self._prepared.launch()


@dataclass
class _Rank:
    accident: Accident
    rank: int
    struck: bool = False
    source: Source = field(default_factory=Source)
    shared: SharedMemory | None = None

    def _differs(self, kind: str) -> bool:
        return self.rank == self.accident.victim and self.accident.kind == kind

    def reach(self, phase: str) -> None:
        """Come to a point of the update; for the victim it may be the last."""
        if self.rank != self.accident.victim or phase != self.accident.phase or self.struck:
            return
        self.struck = True
        if self.accident.kind == "cut":
            _cut_connections()
        else:
            os.kill(os.getpid(), signal.Signals[self.accident.kind])

    def _updater(self) -> ExpertUpdater:
        rng = np.random.default_rng(5)
        physical = self.topology.num_physical_experts
        self.old, self.new = (random_placement(rng, NUM_LAYERS, physical, self.num_experts) for _ in range(2))
        if self._differs(OTHER_PLACEMENT):
            self.new = random_placement(rng, NUM_LAYERS, physical, self.num_experts)
        self.tensors = MODEL.weights(self.old, self.topology, self.rank, self.accident.device)
        if self.accident.transport == "copy" and self.accident.device == "cpu":
            self.shared = SharedMemory()
            self.tensors = self.shared.share(self.tensors)
        self._watch_fences()
        return ExpertUpdater(
            ExpertWeights(self.tensors),
            self.old,
            self.topology,
            rank=self.rank,
            transport=self._transport(),
            options=UpdateOptions(
                verify="off" if self.shared is not None else "checksum",  # its column is not in shared memory
                transfer_timeout_s=self.accident.transfer_timeout_s,
                control_timeout_s=self.accident.control_timeout_s,
            ),
            workers=_Workers(self.reach),
            device=self.shared,
            on_commit=lambda _commit: self.reach("commit"),
            logger=EventLogger(observers=[self._watch_staging]),
        )

    def _watch_staging(self, event: Mapping[str, Any]) -> None:
        """Come to the point where a layer is staged, and no other rank knows."""
        if event["event"] == LayerTransferred.name:
            self.reach("staged")

    def _watch_fences(self) -> None:
        """Come to the point where this rank has put up a fence, and no other rank knows."""
        give = SharedAgreement.ballot

        def reach_fence(shared: SharedAgreement) -> tuple[int, ...]:
            given = give(shared)
            if Ballot.from_row(given).fence:
                self.reach("fence")
            return given

        SharedAgreement.ballot = reach_fence  # type: ignore[assignment, method-assign]

    def _transport(self, group: ProcessGroup | None = None) -> Transport:
        shared = self.shared
        memory = CudaIpc if shared is None else lambda _device: shared
        transport = TRANSPORTS[self.accident.transport](TransportOptions(group, memory=memory))
        prepare = transport.prepare
        transport.prepare = lambda exchange: _Reached(prepare(exchange), self.reach)  # type: ignore[method-assign]
        return transport

    async def run(self) -> Report:
        """Update, meet with the accident, serve on, recover, update again."""
        self.topology = EPTopology(self.accident.num_ranks, 1, 3)
        self.num_experts = 2 * self.accident.num_ranks
        async with self._updater() as updater:
            await anyio.to_thread.run_sync(dist.barrier)  # the accident meets ranks that are all connected
            error, detected_s = await self._update_until_error(updater)
            num_steps, in_doubt = await self._serve_on(updater)
            named = getattr(error, "missing", ()) or getattr(error, "ranks", ())
            wrong = self._wrong_slots(updater)
            members = self.accident.reporting
            group = dist.new_group(members, use_local_synchronization=True)
            start = time.monotonic()
            recovery = await updater.recover(self._transport(group), source=self.source)
            recovered_s = time.monotonic() - start
            wrong += self._wrong_slots(updater)
            await self._update_again(updater, members)
            wrong += self._wrong_slots(updater)
            return Report(
                rank=self.rank,
                error=type(error).__name__,
                named=named,
                layer=error.layer_under_way,
                phase=error.phase,
                detected_s=detected_s,
                num_steps_after=num_steps,
                in_doubt=in_doubt,
                members=recovery.ranks,
                rolled_forward=recovery.rolled_forward,
                lost=recovery.lost,
                missing=recovery.missing,
                placement=updater.placement.digest(),
                wrong_slots=wrong,
                recovered_s=recovered_s,
                num_watchdogs=_num_threads_named("pt_nccl_"),
            )

    def _wrong_slots(self, updater: ExpertUpdater) -> list[tuple[int, int]]:
        return MODEL.wrong_slots(self.tensors, updater.placement, self.topology, self.rank)

    async def _update_until_error(self, updater: ExpertUpdater) -> tuple[EplbError, float]:
        if self._differs(LATE):
            await anyio.sleep(2 * CONTROL_TIMEOUT_S + 0.5)  # longer than the others wait for it to begin
        start = time.monotonic()
        try:
            if self.accident.serves:
                handle = updater.begin(self.new)
                with suppress(RankInDoubt):
                    while not handle.done:
                        await updater.step()
                        await anyio.sleep(0.001)
                await handle.wait()
            else:
                await updater.update(self.new)
        except EplbError as error:
            return error, time.monotonic() - start
        raise AssertionError("the update ended as if nothing had happened")

    async def _serve_on(self, updater: ExpertUpdater) -> tuple[int, bool]:
        """Make passes with the placement that this rank has; return how many, and whether a fence ended them."""
        for number in range(20):
            try:
                await updater.step()
            except RankInDoubt:
                return number, True
        return 20, False

    async def _update_again(self, updater: ExpertUpdater, members: list[int]) -> None:
        rng = np.random.default_rng(6)
        drawn = random_placement(rng, NUM_LAYERS, len(members) * 3, self.num_experts)
        placement = on_survivors(drawn, self.topology, members)
        if not self.accident.serves:
            await updater.update(placement)
            return
        handle = updater.begin(placement)
        while not handle.done:
            await updater.step()
            await anyio.sleep(0.001)
        await handle.wait()


def _num_threads_named(prefix: str) -> int:
    """Count the threads of this process, of whatever library, whose name begins so."""
    number = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that has ended meanwhile
            number += (task / "comm").read_text().startswith(prefix)
    return number


def _cut_connections() -> None:
    """Shut down every TCP connection of this process."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    if connection.family != socket.AF_UNIX:
                        connection.shutdown(socket.SHUT_RDWR)
