"""Processes whose main thread ends with an updater open: real interpreters, forked from one that has imported torch.

As a program it reads endings from its argument, as JSON, and prints what came of each rank.
"""

import asyncio
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Never

import numpy as np
import torch
import torch.distributed as dist

from async_eplb import (
    EPTopology,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    GlooLoadGroup,
    SyncUpdater,
    Transport,
    UpdateHandle,
)
from async_eplb.errors import EplbError
from async_eplb.sync import SyncUpdateHandle
from async_eplb.testing.processes import WorldRank, take_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport import TRANSPORTS, TransportOptions
from async_eplb.workers import ThreadWorkers

EXIT_CODE = 7
_NUM_RANKS = 2
_TOPOLOGY = EPTopology(num_ranks=_NUM_RANKS, num_nodes=1, num_local_physical_experts=3)
_AT_ONCE = 4
_SERVES_S = 0.1
_GIVEN_UP_S = 30.0
_MODEL = SampleModel(hidden=8, intermediate=4)


@dataclass(frozen=True, slots=True)
class Ending:
    """A way for main threads to end.

    :param updater: ``"async with"``, ``"async"`` (entered and never left), ``"sync"`` (likewise) or ``"none"``
    :param how: ``"return"``, ``"exception"`` or ``"SIGTERM"``, whose handler raises SystemExit
    :param amid: what is under way: ``"nothing"``, ``"updates"``, ``"opening"``, to which rank 1 never comes, or
        ``"waits"``: a sum of loads that rank 1 takes no part in, and a function that takes a minute; or ``"passes"``:
        an update beside forward passes, which rank 1 makes until it hears of an error
    :param transport: as its table calls it
    :param device: of the weights; ranks may share a GPU
    """

    updater: str
    how: str
    amid: str
    transport: str = "dist"
    device: str = "cpu"

    @property
    def code(self) -> int:
        """The exit status that Python gives it."""
        return {"return": 0, "exception": 1, "SIGTERM": EXIT_CODE}[self.how]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    :param code: its exit status, negative for a signal
    :param after_s: from the end of its main thread, in seconds, and beyond what a process took that had no updater
    :param said: what it wrote as errors
    """

    code: int
    after_s: float
    said: str


def ends_of(endings: Sequence[Ending]) -> list[list[Ended]]:
    """Return for each ending how its ranks ended."""
    with tempfile.TemporaryDirectory(prefix="async-eplb-") as folder:
        argument = json.dumps([asdict(ending) for ending in endings])
        command = [sys.executable, "-m", "support.endings", folder, argument]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
    return [[Ended(**ended) for ended in ranks] for ranks in json.loads(done.stdout)]


class _Main:
    """What the main thread of a rank does."""

    def __init__(self, ending: Ending, rank: int, tell: Callable[[str], object]) -> None:
        rng = np.random.default_rng(0)
        self.old, self.new = (random_placement(rng, 12, _TOPOLOGY.num_physical_experts, 4) for _ in range(2))
        self._ending = ending
        self._rank = rank
        self._tell = tell
        self._tasks: list[asyncio.Task[Any]] = []

    def run(self, store: str) -> None:
        """Open an updater, do something with it, and end."""
        signal.signal(signal.SIGTERM, self._exit)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self._ending.updater == "none":
            torch.zeros(1, device=self._ending.device)
            time.sleep(_SERVES_S)
            self._tell("ready")
            self._end()
            return
        if self._ending.device == "cuda":
            take_gpu(WorldRank(self._rank, _NUM_RANKS, print))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, _NUM_RANKS),  # type: ignore[attr-defined]
            rank=self._rank,
            world_size=_NUM_RANKS,
            timeout=timedelta(seconds=60),
        )
        if self._ending.amid == "opening" and self._rank == 1:
            self._tell("ready")
            time.sleep(60)
        elif self._ending.updater == "sync":
            self._serve_sync()
        else:
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        updater = ExpertUpdater(*self._model(), _TOPOLOGY, rank=self._rank, transport=self._transport())
        if self._ending.amid == "opening":
            self._tell("ready")
        if self._ending.updater == "async with":
            async with updater:
                await self._update_and_end(updater)
        else:
            await updater.__aenter__()
            await self._update_and_end(updater)

    async def _update_and_end(self, updater: ExpertUpdater) -> None:
        async def update() -> None:
            with suppress(EplbError):
                while True:
                    await updater.update(self.new)
                    await updater.update(self.old)

        if self._ending.amid == "updates":
            self._tasks = [asyncio.create_task(update())]
        elif self._ending.amid == "waits":
            group = await GlooLoadGroup.open()
            self._tasks = [asyncio.create_task(ThreadWorkers().run("sleep", partial(time.sleep, 60)))]
            if self._rank == 0:
                self._tasks += [asyncio.create_task(group.sum(torch.zeros(1, dtype=torch.int64)))]
        elif self._ending.amid == "passes":
            handle = updater.begin(self.new)
            while self._rank == 1 and not handle.done:
                await updater.step()
                await asyncio.sleep(0.01)
            self._report(handle)
        await asyncio.sleep(_SERVES_S)
        self._tell("ready")
        if self._ending.how == "SIGTERM":
            await asyncio.sleep(60)
        self._end()

    def _serve_sync(self) -> None:
        updater = SyncUpdater(*self._model(), _TOPOLOGY, rank=self._rank, transport=self._transport())
        if self._ending.amid == "opening":
            self._tell("ready")
        updater.__enter__()
        if self._ending.amid == "updates":
            updater.update(self.new)
            self._tell("ready")
            with suppress(EplbError):
                while self._ending.how == "SIGTERM":
                    updater.update(self.old)
                    updater.update(self.new)
            updater.begin(self.old)  # nobody steps
        elif self._ending.amid == "passes":
            handle = updater.begin(self.new)
            while self._rank == 1 and not handle.done:
                updater.step()
                time.sleep(0.01)
            self._report(handle)
        time.sleep(_SERVES_S)
        self._tell("ready")
        if self._ending.how == "SIGTERM":
            time.sleep(60)
        self._end()

    def _model(self) -> tuple[ExpertWeights, ExpertPlacement]:
        tensors = _MODEL.weights(self.old, _TOPOLOGY, self._rank)
        moved = {row: [t.to(self._ending.device) for t in each] for row, each in tensors.items()}
        return ExpertWeights(moved), self.old

    def _transport(self) -> Transport:
        return TRANSPORTS[self._ending.transport](TransportOptions())

    def _report(self, handle: UpdateHandle | SyncUpdateHandle) -> None:
        if self._rank == 1:
            try:
                handle.result()
            except EplbError as error:
                sys.stderr.write(f"{type(error).__name__} {error.__dict__.get('ranks')}")

    def _end(self) -> None:
        self._tell(f"{time.monotonic()}")
        if self._ending.how == "exception":
            raise ValueError("the end")

    def _exit(self, _number: int, _frame: FrameType | None) -> Never:
        self._tell(f"{time.monotonic()}")
        sys.exit(EXIT_CODE)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    lines: IO[str]
    errors: Path

    def ended(self, at_s: float) -> Ended:
        """Return how the process ended, which it did at this time."""
        _, status = os.waitpid(self.pid, 0)
        began_s = min((float(line) for line in self.lines if line.strip() != "ready"), default=0.0)
        return Ended(os.waitstatus_to_exitcode(status), at_s - began_s, self.errors.read_text())


def _fork(ending: Ending, rank: int, folder: Path) -> _Process | None:
    """Return the new process; or, in it, None after what its main thread does. Then the interpreter is to end."""
    errors = folder / f"errors of rank {rank}"
    here, there = os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        return _Process(pid, os.fdopen(here), errors)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    _Main(ending, rank, lambda line: os.write(there, f"{line}\n".encode())).run(str(folder / "store"))
    return None


def _ends(worlds: Sequence[tuple[Ending, list[_Process]]]) -> list[list[Ended]]:
    """Ask processes to end, and wait for that; kill what does not."""
    for ending, ranks in worlds:
        for process in ranks:
            process.lines.readline()
        if ending.how == "SIGTERM":
            for process in ranks:
                os.kill(process.pid, signal.SIGTERM)
    running = {os.pidfd_open(process.pid): process for _, ranks in worlds for process in ranks}
    deadline = time.monotonic() + _GIVEN_UP_S
    ended: dict[int, Ended] = {}
    while running:
        for fd in select.select(list(running), [], [], max(deadline - time.monotonic(), 0.0))[0]:
            process = running.pop(fd)
            ended[process.pid] = process.ended(time.monotonic())
            os.close(fd)
        if time.monotonic() > deadline:
            for process in running.values():
                os.kill(process.pid, signal.SIGKILL)
    return [[ended[process.pid] for process in ranks] for _, ranks in worlds]


def _main(folder: Path, endings: Sequence[Ending]) -> None:
    """Let some processes of each ending run at once; nothing here may keep a forked process from ending."""
    results = []
    for first in range(0, len(endings), _AT_ONCE):
        worlds: list[tuple[Ending, list[_Process]]] = []
        batch = endings[first : first + _AT_ONCE]
        for number, ending in enumerate([*batch, Ending("none", "return", "nothing", device=batch[0].device)]):
            place = folder / f"{first} {number}"
            place.mkdir()
            worlds.append((ending, []))
            for rank in range(_NUM_RANKS):
                process = _fork(ending, rank, place)
                if process is None:
                    return
                worlds[-1][1].append(process)
        *ended, plain = _ends(worlds)
        plain_s = max(each.after_s for each in plain)
        results += [[asdict(replace(each, after_s=each.after_s - plain_s)) for each in ranks] for ranks in ended]
    print(json.dumps(results))  # noqa: T201 - for the process that asked


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is forked is not looked through at each end
    _main(Path(sys.argv[1]), [Ending(**each) for each in json.loads(sys.argv[2])])
