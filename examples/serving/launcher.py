"""Starts a server's processes and ends them."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import anyio

from async_eplb.testing.processes import World
from serving.config import RebalancingConfig, ServingConfig
from serving.rank import Listening, ServeOptions, serve_rank

_LIFETIME_S = 7 * 24 * 3600.0


@asynccontextmanager
async def running_server(
    num_ranks: int,
    config: ServingConfig,
    *,
    port: int = 0,
    rebalancing: RebalancingConfig | None = None,
) -> AsyncIterator[Listening]:
    """Run a server on the loopback interface; leaving lets it answer what it has taken, and ends it.

    :param rebalancing: how experts move; None: they stay
    :raises WorldError: if one of its processes fails
    """
    async with anyio.TemporaryDirectory(prefix="async-eplb-serving-") as folder:
        options = ServeOptions(socket_path=str(Path(folder) / "front"), port=port, rebalancing=rebalancing)
        async with _world(num_ranks, config, options) as listening:
            yield listening


@asynccontextmanager
async def _world(num_ranks: int, config: ServingConfig, options: ServeOptions) -> AsyncIterator[Listening]:
    started = anyio.Event()
    said: list[Listening] = []

    def hear(_rank: int, message: object) -> None:
        if isinstance(message, Listening):
            said.append(message)
            anyio.from_thread.run_sync(started.set)

    async def run() -> None:
        world = World(num_ranks, timeout_s=_LIFETIME_S, on_message=hear)
        try:
            await anyio.to_thread.run_sync(partial(world.run, serve_rank, config, options))
        finally:
            started.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            await started.wait()
            if said:
                yield said[0]
        finally:
            with anyio.CancelScope(shield=True):
                await started.wait()
            for listening in said:
                with suppress(ProcessLookupError):
                    os.kill(listening.process, signal.SIGTERM)
