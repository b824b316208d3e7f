"""What moves the experts of one rank while passes go on: an updater, and a rebalancer that tells it where to."""

import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import EPTopology, EventLogger, ExpertPlacement, ExpertUpdater, ExpertWeights, TorchDistTransport
from async_eplb.events.json_log import JsonLog
from async_eplb.load.group import GlooLoadGroup
from async_eplb.load.window import LoadWindow
from async_eplb.policy import Global, Hierarchical, Incremental, PlacementPolicy, RebalanceTerms
from async_eplb.rebalancer import RebalanceOptions, Rebalancer
from serving.config import PolicyName, RebalancingConfig

_LINK_BYTES_PER_S = 1e9
"""What a rank receives over the loopback interface, about."""
_LAYER_STEP_S = 2e-3
"""What the busiest rank takes for the experts of one layer, about."""
_HORIZON_STEPS = 1000


@dataclass(slots=True)
class UpdateRecord:
    """An update of one rank.

    :param begun_s: on this machine's monotonic clock
    :param commits: layer and step boundary of each commit
    :param finished: whether all layers were committed
    """

    begun_s: float
    ended_s: float = math.inf
    commits: list[tuple[int, int]] = field(default_factory=list)
    finished: bool = False


class UpdateHistory:
    """Remembers a rank's updates by their events, as an observer."""

    def __init__(self) -> None:
        self.updates: list[UpdateRecord] = []
        """Those that have ended, in order."""
        self._running: UpdateRecord | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in an event."""
        name = event["event"]
        if name == "eplb.update.started":
            self._running = UpdateRecord(time.monotonic())
        if name == "eplb.layer.committed" and self._running is not None:
            self._running.commits.append((event["layer"], event["step"]))
        if name in ("eplb.update.finished", "eplb.update.failed") and self._running is not None:
            self._running.ended_s = time.monotonic()
            self._running.finished = name == "eplb.update.finished"
            self.updates.append(self._running)
            self._running = None


@dataclass(frozen=True, slots=True)
class Background:
    """What works beside the engine."""

    updater: ExpertUpdater
    rebalancer: Rebalancer
    history: UpdateHistory
    load_group: GlooLoadGroup
    model_group: ProcessGroup

    @asynccontextmanager
    async def rebalancing(self) -> AsyncIterator[None]:
        """Rebalance inside. All ranks leave this after the same pass.

        They cancel their rebalancers one after another. So one may have begun what another never will: it hears of
        that when the load group is closed, and of an update when the updater is left.
        """
        async with anyio.create_task_group() as tasks:
            await tasks.start(self.rebalancer.run)
            yield
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(dist.barrier, self.model_group)
            self.load_group.close()


@asynccontextmanager
async def background(
    experts: dict[int, list[Tensor]],
    placement: ExpertPlacement,
    topology: EPTopology,
    window: LoadWindow,
    group: ProcessGroup,
    config: RebalancingConfig,
) -> AsyncIterator[Background]:
    """Connect what moves the experts; all ranks do this together.

    :param experts: live weights of this rank, layer → tensors
    :param placement: that they have
    :param window: the model counts tokens with it
    :param group: the model's group, of CPUs
    """
    history = UpdateHistory()
    rank = dist.get_rank(group)
    path = os.devnull if config.log_dir is None else config.log_dir / f"rank-{rank}.jsonl"
    weights = ExpertWeights(experts, names=("w13", "w13_scale", "w2", "w2_scale"))
    transport = TorchDistTransport(group)
    async with AsyncExitStack() as stack:
        logger = EventLogger(stack.enter_context(JsonLog(path)).logger(), observers=[history])
        updater = await stack.enter_async_context(
            ExpertUpdater(weights, placement, topology, rank=rank, transport=transport, logger=logger)
        )
        load_group = await GlooLoadGroup.open(group)
        rebalancer = Rebalancer(
            updater,
            window,
            policy_named(config.policy, topology),
            group=load_group,
            terms=RebalanceTerms(
                expert_nbytes=sum(weights.slot_nbytes(0)),
                link_bytes_per_s=_LINK_BYTES_PER_S,
                layer_step_s=_LAYER_STEP_S,
                horizon_steps=_HORIZON_STEPS,
            ),
            options=RebalanceOptions(every_steps=config.every_steps, max_nbytes_per_step=config.max_nbytes_per_step),
            logger=logger,
        )
        yield Background(updater, rebalancer, history, load_group, group)


def policy_named(name: PolicyName, topology: EPTopology) -> PlacementPolicy:
    """Return a policy of the library."""
    policies: dict[PolicyName, PlacementPolicy] = {
        "global": Global(),
        "hierarchical": Hierarchical(num_groups=topology.num_nodes),
        "incremental": Incremental(),
    }
    return policies[name]
