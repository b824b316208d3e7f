"""One process of the server: a rank of the model with its engine, and on rank 0 the front."""

import math
import os
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial

import anyio
import numpy as np
import torch.distributed as dist

from async_eplb import ExpertMap
from async_eplb.load.window import LoadWindow
from async_eplb.testing.processes import WorldRank
from serving.agent import RankAgent
from serving.background import Background, background
from serving.boundary import NoUpdates
from serving.checkpoint import local_experts
from serving.config import RebalancingConfig, ServingConfig
from serving.engine import Engine
from serving.front import Front
from serving.model import MoEModel
from serving.server import HttpServer, build_app


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a server runs.

    :param socket_path: where the ranks find the front
    :param port: of the HTTP front on the loopback interface; any free one if 0
    :param rebalancing: how experts move; None: they stay
    """

    socket_path: str
    port: int = 0
    rebalancing: RebalancingConfig | None = None


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
    window = LoadWindow(config.model.num_layers, config.model.num_logical_experts, config.window_passes)
    async with AsyncExitStack() as stack:
        beside: Background | None = None
        if options.rebalancing is not None:
            opening = background(experts, placement, topology, window, group, options.rebalancing)
            beside = await stack.enter_async_context(opening)
        expert_map = beside.updater.expert_map if beside else ExpertMap(placement, topology, rank=world.rank)
        model = MoEModel(config, experts, expert_map, group, window)
        engine = Engine(model, beside.updater if beside else NoUpdates(), group, config.engine)
        agent = RankAgent(world.rank, engine)
        async with anyio.create_task_group() as tasks:
            if world.rank == 0:
                await tasks.start(_run_front, world, engine, beside, options)
            await anyio.to_thread.run_sync(dist.barrier, group)
            if beside is None:
                await agent.run(options.socket_path)
            else:
                async with beside.rebalancing():
                    await agent.run(options.socket_path)


async def _run_front(
    world: WorldRank,
    engine: Engine,
    beside: Background | None,
    options: ServeOptions,
    *,
    task_status: anyio.abc.TaskStatus[None],
) -> None:
    """Run the front and its HTTP server until all ranks have gone."""
    front = Front(world.num_ranks)
    async with await anyio.create_unix_listener(options.socket_path, mode=0o600) as listener:
        with socket.create_server(("127.0.0.1", options.port)) as http_listener:
            task_status.started()
            async with anyio.create_task_group() as tasks:
                rebalance_now = partial(_rebalance, beside) if beside else None
                http = HttpServer(build_app(front, partial(_statistics, engine, beside), rebalance_now))
                tasks.start_soon(http.run_on, http_listener)
                tasks.start_soon(_announce, front, world, http_listener.getsockname()[1])
                async with anyio.create_task_group() as watching:
                    watching.start_soon(_stop_on_signal, front)
                    await front.run(listener)
                    watching.cancel_scope.cancel()
                http.stop()


async def _rebalance(beside: Background) -> dict[str, object]:
    """Demand a rebalance of all ranks, which control rounds tell the others; return what it did."""
    rebalance = await beside.rebalancer.rebalance_now()
    decision = rebalance.decision
    return {
        "number": rebalance.number,
        "reason": decision.reason.value,
        "layers": list(rebalance.summary.layers) if rebalance.summary else [],
        "balancedness_before": list(decision.balancedness_before),
        "balancedness_after": list(decision.balancedness_after),
    }


async def _announce(front: Front, world: WorldRank, port: int) -> None:
    await front.connected.wait()
    world.send(Listening(os.getpid(), port))


async def _stop_on_signal(front: Front) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            front.stop()


def _statistics(engine: Engine, beside: Background | None) -> dict[str, object]:
    records = list(engine.log.records)
    statistics: dict[str, object] = {
        "passes": engine.number,
        "pass_ms": percentiles([record.pass_ms for record in records]),
        "step_ms": percentiles([record.step_ms for record in records]),
        "balancedness": engine.log.history(),
        "updates": [],
    }
    if beside is not None:
        rebalancer = asdict(beside.rebalancer.statistics())
        if math.isnan(rebalancer["balancedness"]):
            rebalancer["balancedness"] = None
        statistics |= {
            "updates": [asdict(update) for update in beside.history.updates],
            "updater": asdict(beside.updater.statistics()),
            "rebalancer": rebalancer,
        }
    return statistics


def percentiles(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum; nothing of nothing."""
    if not values:
        return {}
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return {"p50": p50, "p99": p99, "max": max(values)}
