"""One process of the server: a rank of the model with its engine, and on rank 0 the front."""

import multiprocessing
import os
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import anyio
import numpy as np
import torch.distributed as dist
from torch.distributed import ProcessGroup

from async_eplb import ExpertMap, ExpertPlacement, ExpertUpdater, ExpertWeights, TorchDistTransport
from async_eplb.launch import WorldRank
from serving.agent import RankAgent
from serving.boundary import BlockingUpdates, NoUpdates
from serving.checkpoint import local_experts
from serving.config import ServingConfig
from serving.engine import Engine
from serving.exchange import gather_rows
from serving.front import Front
from serving.load import CountedLoad
from serving.model import MoEModel
from serving.rebalancing import spread
from serving.server import HttpServer, build_app

Rebalancing = Literal["off", "blocking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a server runs.

    :param socket_path: where the ranks find the front
    :param port: of the HTTP front on the loopback interface; any free one if 0
    :param rebalancing: how experts move when asked to
    :param rebalance_every: passes after which they move unasked; 0: never
    """

    socket_path: str
    port: int = 0
    rebalancing: Rebalancing = "off"
    rebalance_every: int = 0


@dataclass(frozen=True, slots=True)
class Listening:
    """What rank 0 tells the parent when the server takes requests. SIGTERM to ``process`` ends it."""

    process: int
    port: int


def serve_rank(world: WorldRank, config: ServingConfig, options: ServeOptions) -> None:
    """Be one rank of a server until it is stopped."""
    anyio.run(_serve, world, config, options)


async def _serve(world: WorldRank, config: ServingConfig, options: ServeOptions) -> None:
    group = dist.group.WORLD
    assert group is not None
    placement = config.first_placement(world.num_ranks)
    topology = config.topology(world.num_ranks)
    experts = local_experts(config.model, placement, topology, world.rank)
    load = CountedLoad(config.model.num_layers, config.model.num_logical_experts)
    async with AsyncExitStack() as stack:
        boundary = NoUpdates()
        if options.rebalancing == "off":
            expert_map = ExpertMap(placement, topology, rank=world.rank)
        else:
            updater = ExpertUpdater(
                ExpertWeights(experts, names=("w13", "w13_scale", "w2", "w2_scale")),
                placement,
                topology,
                rank=world.rank,
                transport=TorchDistTransport(group),
            )
            await stack.enter_async_context(updater)
            expert_map = updater.expert_map
            choose = partial(_choose, load, group, updater)
            boundary = BlockingUpdates(updater, group, choose, every=options.rebalance_every)
        model = MoEModel(config, experts, expert_map, group, load)
        engine = Engine(model, boundary, group, config.engine)
        agent = RankAgent(world.rank, engine, boundary.request)
        async with anyio.create_task_group() as tasks:
            if world.rank == 0:
                await tasks.start(_run_front, world, engine, boundary, options)
            await anyio.to_thread.run_sync(dist.barrier, group)
            await agent.run(options.socket_path)


def _choose(load: CountedLoad, group: ProcessGroup, updater: ExpertUpdater) -> ExpertPlacement:
    """Sum the load over the ranks and spread it."""
    counts = load.total()
    total = np.sum(gather_rows(group, counts.flatten().tolist()), axis=0).reshape(counts.shape)
    return spread(total, updater.topology)


async def _run_front(
    world: WorldRank,
    engine: Engine,
    boundary: NoUpdates,
    options: ServeOptions,
    *,
    task_status: anyio.abc.TaskStatus[None],
) -> None:
    """Run the front and its HTTP server until all ranks have gone."""
    front = Front(world.num_ranks)
    http = HttpServer(build_app(front, partial(_statistics, engine, boundary)))
    async with await anyio.create_unix_listener(options.socket_path, mode=0o600) as listener:
        with socket.create_server(("127.0.0.1", options.port)) as http_listener:
            task_status.started()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(http.run_on, http_listener)
                tasks.start_soon(_announce, front, world, http_listener.getsockname()[1])
                async with anyio.create_task_group() as watching:
                    watching.start_soon(_stop_on_signal, front)
                    watching.start_soon(_stop_without_parent, front)
                    await front.run(listener)
                    watching.cancel_scope.cancel()
                http.stop()


async def _announce(front: Front, world: WorldRank, port: int) -> None:
    await front.connected.wait()
    world.send(Listening(os.getpid(), port))


async def _stop_on_signal(front: Front) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            front.stop()


async def _stop_without_parent(front: Front) -> None:
    """Stop when the process that started the world is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        await anyio.wait_readable(int(parent.sentinel))
        front.stop()


def _statistics(engine: Engine, boundary: NoUpdates) -> dict[str, object]:
    records = list(engine.log.records)
    return {
        "passes": engine.number,
        "pass_ms": percentiles([record.pass_ms for record in records]),
        "step_ms": percentiles([record.step_ms for record in records]),
        "balancedness": engine.log.history(),
        "updates": [asdict(update) for update in boundary.updates],
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum; nothing of nothing."""
    if not values:
        return {}
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return {"p50": p50, "p99": p99, "max": max(values)}
