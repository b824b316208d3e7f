"""The example server's answers: the same bits under any placement, in any batch, and while experts move."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import anyio
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import (
    EventLogger,
    ExpertMap,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    TorchDistTransport,
    UpdateOptions,
)
from async_eplb.load.window import LoadWindow
from async_eplb.testing import WorldRank, run_world
from async_eplb.testing.processes import take_gpu
from async_eplb.testing.sample_model import random_placement
from serving.background import UpdateHistory, UpdateRecord, background
from serving.blocks import BLOCK_ROWS, in_blocks, rms_norm, swiglu
from serving.boundary import NoUpdates, StepBoundary
from serving.checkpoint import dense_weights, expert_tensors, local_experts
from serving.config import DispatchAlgorithm, EngineConfig, ModelConfig, RebalancingConfig, ServingConfig
from serving.engine import Engine
from serving.model import MoEModel
from serving.sequences import Batch, Request

MODEL = ModelConfig(num_layers=3)
NUM_REQUESTS = 20

Answer = list[tuple[int, str]]
"""A request's tokens, each with a digest of the logits that chose it."""


@dataclass(frozen=True)
class Scenario:
    """How requests are served; nothing of it may show in the answers.

    :param placement_seed: of a random first placement; the trivial one without it
    :param updates: how experts move meanwhile: ``"random"``: to one random placement after another; ``"rebalancer"``:
        after the measured load, as often as it can
    :param shift: ranks by which requests are dealt out differently
    :param stride: passes between two requests' admission
    :param delay_seed: of what each rank sleeps before each pass; no sleep without it
    :param backend: ``"nccl"``: on GPUs, which several ranks may share
    """

    slots_per_expert: float = 1.5
    placement_seed: int | None = None
    dispatch: DispatchAlgorithm = "static"
    updates: Literal["off", "random", "rebalancer"] = "off"
    shift: int = 0
    stride: int = 1
    delay_seed: int | None = None
    backend: Literal["gloo", "nccl"] = "gloo"


@dataclass(frozen=True)
class Outcome:
    """The observations of one rank.

    :param token_passes: passes in which it generated tokens
    """

    answers: dict[int, Answer]
    token_passes: set[int]
    num_passes: int
    updates: list[UpdateRecord]


class WatchedModel(MoEModel):
    """Remembers a digest of all logits, and may dawdle before a pass."""

    delays: np.random.Generator | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.answers: dict[int, Answer] = {}
        self.token_passes: set[int] = set()

    def forward(self, batch: Batch, capacity: int) -> Tensor:
        """Run a pass."""
        if self.delays is not None:
            time.sleep(self.delays.exponential(0.003))
        logits = super().forward(batch, capacity)
        if batch.spans:
            self.token_passes.add(self._num_passes)
        for span, row in zip(batch.spans, logits, strict=True):
            digest = hashlib.blake2b(row.cpu().numpy().tobytes(), digest_size=8).hexdigest()
            self.answers.setdefault(span.sequence.request.number, []).append((int(row.argmax()), digest))
        return logits


def requests(num_ranks: int, rank: int, scenario: Scenario) -> Iterator[Request]:
    """Return the requests of a rank: prompts of one topic each, lengths from 3 to 20."""
    rng = np.random.default_rng(0)
    for number in range(NUM_REQUESTS):
        topic = MODEL.tokens_of(number // 4 % MODEL.num_topics)
        prompt = tuple(rng.integers(topic.start, topic.stop, rng.integers(3, 21)).tolist())
        max_tokens = int(rng.integers(5, 25))
        if (number + scenario.shift) % num_ranks == rank:
            not_before = number * scenario.stride
            yield Request(number=number, prompt=prompt, max_tokens=max_tokens, not_before=not_before)


def serve(world: WorldRank, scenario: Scenario) -> Outcome:
    """Be one rank: serve all requests and stop."""
    return anyio.run(_serve, world, scenario)


async def _serve(world: WorldRank, scenario: Scenario) -> Outcome:
    engine_config = EngineConfig(max_batch=4, max_pass_tokens=40)
    config = ServingConfig(
        slots_per_expert=scenario.slots_per_expert, dispatch=scenario.dispatch, model=MODEL, engine=engine_config
    )
    topology = config.topology(world.num_ranks)
    physical = topology.num_physical_experts
    rng = np.random.default_rng(scenario.placement_seed or 0)

    def draw() -> ExpertPlacement:
        return random_placement(rng, MODEL.num_layers, physical, MODEL.num_logical_experts)

    placement = config.first_placement(world.num_ranks) if scenario.placement_seed is None else draw()
    group = dist.group.WORLD
    assert group is not None
    device, model_group = torch.device("cpu"), group
    if scenario.backend == "nccl":
        device, model_group = join_gpus(world)
    tensors = local_experts(MODEL, placement, topology, world.rank, device)
    window = LoadWindow(MODEL.num_layers, MODEL.num_logical_experts, 6, device)

    async def run(expert_map: ExpertMap, boundary: StepBoundary, history: UpdateHistory) -> Outcome:
        model = WatchedModel(config, tensors, expert_map, model_group, window)
        if scenario.delay_seed is not None:
            model.delays = np.random.default_rng([scenario.delay_seed, world.rank])
        engine = Engine(model, boundary, group, engine_config)
        for request in requests(world.num_ranks, world.rank, scenario):
            engine.submit(request)
        engine.stop()
        await engine.run()
        return Outcome(model.answers, model.token_passes, engine.number, history.updates)

    if scenario.updates == "off":
        return await run(ExpertMap(placement, topology, rank=world.rank, device=device), NoUpdates(), UpdateHistory())
    if scenario.updates == "rebalancer":
        rebalancing = RebalancingConfig(policy="global", every_steps=1)
        async with background(tensors, placement, topology, window, group, rebalancing) as beside, beside.rebalancing():
            return await run(beside.updater.expert_map, beside.updater, beside.history)
    history = UpdateHistory()
    updater = ExpertUpdater(
        ExpertWeights(tensors),
        placement,
        topology,
        rank=world.rank,
        transport=TorchDistTransport(group),
        options=UpdateOptions(verify="checksum"),
        logger=EventLogger(observers=[history]),
    )

    async def move() -> None:
        while True:
            await updater.begin(draw()).wait()

    async with updater, anyio.create_task_group() as tasks:
        tasks.start_soon(move)
        outcome = await run(updater.expert_map, updater, history)
        tasks.cancel_scope.cancel()
    return outcome


def join_gpus(world: WorldRank) -> tuple[torch.device, ProcessGroup]:
    """Take a GPU and join an NCCL group, in which ranks of one GPU count as hosts of their own."""
    device = take_gpu(world)
    group = dist.new_group(backend="nccl")
    assert group is not None
    return device, group


def answers(num_ranks: int, scenario: Scenario) -> dict[int, Answer]:
    """Serve all requests with real processes; return the answer to each."""
    outcomes = run_world(serve, num_ranks, scenario)
    assert len({outcome.num_passes for outcome in outcomes}) == 1
    if scenario.updates != "off":
        require_updates_beside_serving(outcomes)
    merged = {number: answer for outcome in outcomes for number, answer in outcome.answers.items()}
    assert len(merged) == NUM_REQUESTS
    return merged


def require_updates_beside_serving(outcomes: list[Outcome]) -> None:
    """Check that several updates of several layers were committed between passes that generated tokens.

    And that every rank committed each layer at the same boundary.
    """
    for outcome in outcomes:
        assert [update.commits for update in outcome.updates] == [update.commits for update in outcomes[0].updates]
    token_passes = set[int]().union(*(outcome.token_passes for outcome in outcomes))
    beside = [
        update.commits
        for update in outcomes[0].updates
        if update.finished and all({step - 1, step} <= token_passes for _, step in update.commits)
    ]
    assert sum(len(commits) > 1 for commits in beside) >= 3


@pytest.fixture(scope="module")
def reference() -> dict[int, Answer]:
    """Answers of four ranks under the trivial placement."""
    return answers(4, Scenario())


@pytest.mark.parametrize(
    ("num_ranks", "scenario"),
    [
        pytest.param(4, Scenario(), id="again"),
        pytest.param(4, Scenario(placement_seed=1), id="another placement"),
        pytest.param(4, Scenario(slots_per_expert=2, placement_seed=2, dispatch="round_robin"), id="replicas in turn"),
        pytest.param(4, Scenario(placement_seed=3, shift=1, stride=3, delay_seed=0), id="other batches"),
        pytest.param(1, Scenario(slots_per_expert=1), id="one rank"),
        pytest.param(8, Scenario(placement_seed=4), id="eight ranks"),
        pytest.param(4, Scenario(updates="random"), id="updates"),
        pytest.param(4, Scenario(updates="random", dispatch="round_robin", delay_seed=1), id="updates and delays"),
        pytest.param(8, Scenario(updates="random", delay_seed=2), id="eight ranks, updates and delays"),
        pytest.param(4, Scenario(updates="rebalancer", stride=3, delay_seed=3), id="rebalancer"),
    ],
)
def test_answers_are_the_same_bits(num_ranks: int, scenario: Scenario, reference: dict[int, Answer]) -> None:
    """Tokens and logits of every request are those of the reference."""
    assert answers(num_ranks, scenario) == reference


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_over_nccl_are_the_same_bits() -> None:
    """The same code over NCCL: other placements, batches and updates give the same bits there too."""
    on_gpus = answers(2, Scenario(backend="nccl"))
    assert answers(2, Scenario(backend="nccl", placement_seed=1, shift=1, stride=2)) == on_gpus
    assert answers(4, Scenario(backend="nccl", updates="random", dispatch="round_robin")) == on_gpus


def test_answers_depend_on_the_experts(reference: dict[int, Answer]) -> None:
    """Different prompts give different logits, and answers are not one token over and over."""
    digests = [digest for answer in reference.values() for _, digest in answer]
    assert len(set(digests)) == len(digests)
    assert np.mean([len({token for token, _ in answer}) / len(answer) for answer in reference.values()]) > 0.5


@pytest.mark.parametrize("place", range(BLOCK_ROWS))
def test_a_row_of_a_block_depends_on_no_other(place: int) -> None:
    """At any place in its block, beside any other rows, a row's result is the same bits."""
    generator = torch.Generator().manual_seed(place)
    row = torch.randn(MODEL.hidden, generator=torch.Generator().manual_seed(0))
    w13, w13_scale, w2, w2_scale = expert_tensors(MODEL, 0, 0)
    dense = dense_weights(MODEL)
    alone = in_blocks(row[None])[0]
    beside = torch.randn(BLOCK_ROWS, MODEL.hidden, generator=generator)
    beside[place] = row
    for compute in (
        rms_norm,
        lambda block: swiglu(block, w13, w13_scale, w2, w2_scale),
        lambda block: block @ dense.layers[0].qkv,
        lambda block: block @ dense.layers[0].router,
        lambda block: block @ dense.head,
        lambda block: block[:, :2].contiguous().softmax(-1),
    ):
        assert torch.equal(compute(alone)[0], compute(beside)[place])
