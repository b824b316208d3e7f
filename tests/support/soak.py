"""A long run of forward passes with updates beside it, which notices any torn layer in the pass that reads it.

In every pass each rank compares a fingerprint of each local slot's live bytes with the fingerprint of the expert that
its published map says is there, all ranks compare their maps, and logits that depend on an expert of every layer are
compared, bit for bit, with those of the same tokens before the first update. All happens on the stream of the pass.
"""

import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import anyio
import numpy as np
import torch
import torch.distributed as dist
from anyio.lowlevel import checkpoint
from torch import Tensor

from async_eplb import (
    EPTopology,
    ExpertMap,
    ExpertUpdater,
    ExpertWeights,
    LayerCommit,
    Transport,
    UpdateOptions,
)
from async_eplb.testing import WorldRank
from async_eplb.testing.processes import take_gpu
from async_eplb.testing.sample_model import SampleModel, random_placement
from async_eplb.transport import TRANSPORTS, TransportOptions
from async_eplb.transport.copy_engine.cuda_ipc import CudaIpc
from support.shared_memory import SharedMemory, be_on_host

_EVERY = 16
"""Passes between two looks at what the device has found, which wait for it."""
_NUM_BATCHES, _NUM_TOKENS, _WIDTH = 16, 8, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """Parameters of a run.

    :param backend: of the model's collectives
    :param transport: of the weights; ``"dist"`` is torch.distributed with the same backend, ``"hybrid"`` the copy
        engine within nodes, which are taken for hosts, and that between them
    :param num_updates: one after another, beside serving; the run ends with the last of them
    :param delay_s: each rank's host waits up to this long in each pass, at random
    """

    num_nodes: int = 1
    backend: Literal["gloo", "nccl"] = "gloo"
    transport: Literal["dist", "copy", "hybrid"] = "dist"
    num_updates: int = 5
    num_steps: int = 0
    num_layers: int = 4
    num_slots: int = 4
    model: SampleModel = field(default_factory=partial(SampleModel, hidden=64, intermediate=32))
    delay_s: float = 0.002
    options: UpdateOptions = field(default_factory=partial(UpdateOptions, verify="checksum"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakResult:
    """The observations of one rank.

    :param torn: slots that did not hold what the map said, over all passes
    :param disagreeing: layers whose map was not the same on all ranks, over all passes
    :param other_logits: passes with other logits than before the first update
    :param commits: (update, layer) → boundary
    """

    num_steps: int
    num_updates: int
    torn: int
    disagreeing: int
    other_logits: int
    commits: dict[tuple[int, int], int]
    wrong_slots: list[tuple[int, int]]
    num_fence_waits: int
    longest_step_ms: float


def soak_rank(world: WorldRank, soak: Soak) -> SoakResult:
    """Be one rank."""
    return anyio.run(_Rank(world, soak).run)


class _Rank:
    def __init__(self, world: WorldRank, soak: Soak) -> None:
        self.soak = soak
        self.rank = world.rank
        self.topology = EPTopology(world.num_ranks, soak.num_nodes, soak.num_slots)
        self.device = torch.device("cpu")
        if soak.backend == "nccl":
            self.device = take_gpu(world)
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        self.group = dist.new_group(backend=soak.backend)
        self.rng = np.random.default_rng(soak.num_layers)
        self.delays = random.Random(world.rank)
        physical = self.topology.num_physical_experts
        self.num_experts = physical // 2 + 1
        self.placement = random_placement(self.rng, soak.num_layers, physical, self.num_experts)
        self.tensors = soak.model.weights(self.placement, self.topology, world.rank, self.device)
        if soak.transport == "hybrid":
            be_on_host(self.topology.node_of(world.rank))
        self.shared = SharedMemory() if soak.transport != "dist" and soak.backend == "gloo" else None
        if self.shared is not None:
            self.tensors = self.shared.share(self.tensors)
        self.views = [
            self.tensors[layer][0].view(torch.uint8).flatten(1).view(torch.int64) for layer in range(soak.num_layers)
        ]
        self.factors = torch.arange(1, self.views[0].shape[1] + 1, dtype=torch.int64, device=self.device) * 2 + 1
        self.expected = self._fingerprints()
        self.found = torch.zeros(3, dtype=torch.int64, device=self.device)
        self.commits: dict[tuple[int, int], int] = {}
        self.update = 0
        self.done = False

    def _transport(self) -> Transport:
        shared = self.shared
        memory = CudaIpc if shared is None else lambda _device: shared
        return TRANSPORTS[self.soak.transport](TransportOptions(backend=self.soak.backend, memory=memory))

    def _fingerprints(self) -> Tensor:
        """Return the fingerprint of each expert: int64 ``[layers, experts]``."""
        rows = [
            [self.soak.model.expert_bytes(layer, expert)[0].view(torch.int64) for expert in range(self.num_experts)]
            for layer in range(self.soak.num_layers)
        ]
        words = torch.stack([torch.stack(row) for row in rows]).to(self.device)
        return (words * self.factors).sum(-1)

    async def run(self) -> SoakResult:
        def note_commit(commit: LayerCommit) -> None:
            self.commits[self.update, commit.layer] = updater.statistics().step

        updater = ExpertUpdater(
            ExpertWeights(self.tensors),
            self.placement,
            self.topology,
            rank=self.rank,
            transport=self._transport(),
            options=self.soak.options,
            device=self.shared,
            on_commit=note_commit,
        )
        async with updater:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._update, updater)
                num_steps = await self._serve(updater)
            statistics = updater.statistics()
            torn, disagreeing, other_logits = self.found.tolist()
            wrong = self.soak.model.wrong_slots(self.tensors, updater.placement, self.topology, self.rank)
        return SoakResult(
            num_steps=num_steps,
            num_updates=self.update,
            torn=torn,
            disagreeing=disagreeing,
            other_logits=other_logits,
            commits=self.commits,
            wrong_slots=wrong,
            num_fence_waits=statistics.num_fence_waits,
            longest_step_ms=statistics.longest_step_ms,
        )

    async def _update(self, updater: ExpertUpdater) -> None:
        physical = self.topology.num_physical_experts
        await updater.demands.until_step(_NUM_BATCHES)
        for _ in range(self.soak.num_updates):
            self.update += 1
            new = random_placement(self.rng, self.soak.num_layers, physical, self.num_experts)
            await updater.begin(new).wait()
        self.done = True

    async def _serve(self, updater: ExpertUpdater) -> int:
        """Make passes until all ranks are done; return how many."""
        passes = Passes(self, updater.expert_map)
        number = 0
        while True:
            number += 1
            await checkpoint()
            await updater.step(number)
            self._check(updater)
            self.found[2] += passes.are_other(number)
            time.sleep(self.delays.uniform(0, self.soak.delay_s))  # noqa: ASYNC251 - a busy host, on purpose
            if number % _EVERY == 0:
                finished = self.done and number >= self.soak.num_steps
                flag = torch.tensor([int(finished)], device=self.device)
                dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
                if flag.item():
                    return number

    def _check(self, updater: ExpertUpdater) -> None:
        """Compare live bytes with the published map, and the map with those of the other ranks."""
        table = updater.expert_map.physical_to_logical_map
        local = table[:, self.topology.slots_of(self.rank)]
        actual = torch.stack([(view * self.factors).sum(-1) for view in self.views])
        expected = self.expected.gather(1, local.clamp(min=0))
        self.found[0] += ((actual != expected) & (local >= 0)).sum()
        hashes = (table * torch.arange(3, 2 * table.shape[1] + 3, 2, device=self.device)).sum(-1)
        gathered = [torch.empty_like(hashes) for _ in range(self.topology.num_ranks)]
        dist.all_gather(gathered, hashes, group=self.group)
        self.found[1] += (torch.stack(gathered) != hashes).any(0).sum()


class Passes:
    """Forward passes through an expert of each layer, whose logits do not depend on where experts are.

    All shapes are fixed, so that a token's bits do not depend on what else its rank computes.
    """

    def __init__(self, rank: _Rank, expert_map: ExpertMap) -> None:
        soak, self._topology, self._group = rank.soak, rank.topology, rank.group
        generator = torch.Generator().manual_seed(rank.rank)
        shape = (_NUM_BATCHES, _NUM_TOKENS, _WIDTH)
        self._tokens = torch.randn(shape, generator=generator).to(rank.device)
        experts = torch.randint(rank.num_experts, (_NUM_BATCHES, soak.num_layers, _NUM_TOKENS), generator=generator)
        self._experts = experts.to(rank.device)
        self._matrices = [
            rank.tensors[layer][0].view(torch.uint8).flatten(1)[:, : _WIDTH**2] for layer in range(soak.num_layers)
        ]
        self._map = expert_map.logical_to_dispatch_physical_map
        self._places = torch.arange(_NUM_TOKENS, device=rank.device)
        self._first: list[Tensor] = []

    def are_other(self, number: int) -> Tensor:
        """Return whether the logits of a pass, counted from 1, differ from those when its tokens came first: bool."""
        batch = (number - 1) % _NUM_BATCHES
        logits = self._logits(batch)
        if number <= _NUM_BATCHES:
            self._first.append(logits)
        return (logits != self._first[batch]).any()

    def _logits(self, batch: int) -> Tensor:
        hidden = self._tokens[batch]
        for layer, matrices in enumerate(self._matrices):
            physical = self._map[layer][self._experts[batch, layer]]
            slots = self._topology.num_local_physical_experts
            owners = physical // slots
            sent = hidden.new_zeros(self._topology.num_ranks, _NUM_TOKENS, _WIDTH + 1)
            sent[owners, self._places] = torch.cat([hidden, (physical % slots)[:, None]], dim=1)
            received = self._exchanged(sent).flatten(0, 1)
            chosen = matrices[received[:, -1].long()].view(-1, _WIDTH, _WIDTH).float() / 1024 - 0.125
            out = torch.bmm(received[:, None, :-1], chosen)
            returned = self._exchanged(out.view(self._topology.num_ranks, _NUM_TOKENS, _WIDTH))
            hidden = torch.tanh(returned[owners, self._places])
        return hidden

    def _exchanged(self, data: Tensor) -> Tensor:
        out = torch.empty_like(data)
        dist.all_to_all_single(out, data, group=self._group)
        return out
