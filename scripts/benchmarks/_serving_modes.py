"""The ways of moving experts that the benchmark of serving compares, as what happens at an engine's step boundary."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import anyio
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import (
    EPTopology,
    ExpertMap,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    LayerPlan,
    TorchDistTransport,
    UpdaterStatistics,
    plan_layer,
)
from async_eplb.device import CpuDevice
from async_eplb.plan import layer_transfers
from async_eplb.transport.exchange import Exchange, Message, MessageGroup
from async_eplb.workers import ThreadWorkers
from serving.boundary import NoUpdates

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Experts:
    """One rank's experts, and where they go.

    :param tensors: layer → tensors ``[local physical, ...]``
    :param targets: placements, one after another; the last is :attr:`placement` again
    """

    tensors: dict[int, list[Tensor]]
    placement: ExpertPlacement
    targets: Sequence[ExpertPlacement]
    topology: EPTopology
    rank: int

    @cached_property
    def weights(self) -> ExpertWeights:
        """Byte views of the tensors."""
        return ExpertWeights(self.tensors)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert of one layer."""
        return sum(self.weights.slot_nbytes(0))

    @property
    def moves(self) -> list[tuple[ExpertPlacement, ExpertPlacement]]:
        """From where to where, one after another."""
        return list(pairwise((self.placement, *self.targets)))

    @cached_property
    def staging(self) -> tuple[Tensor, ...]:
        """Memory for one layer, laid out like the live slots."""
        slots, device = self.weights.num_local_physical_experts, self.weights.device
        return tuple(
            torch.zeros(slots, nbytes, dtype=torch.uint8, device=device) for nbytes in self.weights.slot_nbytes(0)
        )

    def staged(self, slot: int) -> list[Tensor]:
        """Return one slot of :attr:`staging`."""
        return [tensor[slot] for tensor in self.staging]

    def plan(self, layer: int, old: ExpertPlacement, new: ExpertPlacement) -> LayerPlan:
        """Plan a layer for this rank."""
        before, after = (placement.physical_to_logical_map[layer] for placement in (old, new))
        return plan_layer(before, after, self.topology, self.rank)

    def messages(self, layer: int, plan: LayerPlan) -> MessageGroup:
        """Return what this rank sends from live slots and receives into :attr:`staging`."""

        def tagged(expert: int, peer: int, tensors: Sequence[Tensor]) -> Iterator[Message]:
            for index, tensor in enumerate(tensors):
                yield Message(peer, expert * len(tensors) + index, tensor)

        live = partial(self.weights.slot_views, layer)
        sends = (m for s in plan.sends for m in tagged(s.logical_expert, s.dst_rank, live(s.src_slot)))
        recvs = (m for r in plan.recvs for m in tagged(r.logical_expert, r.src_rank, self.staged(r.dst_slot)))
        return MessageGroup(tuple(sends), tuple(recvs))

    def copy_own(self, layer: int, plan: LayerPlan) -> None:
        """Copy slots that this rank holds already into :attr:`staging`."""
        for copy in plan.local_copies:
            live = self.weights.slot_views(layer, copy.src_slot)
            for view, staged in zip(live, self.staged(copy.dst_slot), strict=True):
                staged.copy_(view)

    def peak_nbytes(self, layer: int, old: ExpertPlacement, new: ExpertPlacement) -> int:
        """Return the bytes that the busiest rank sends or receives for a layer."""
        before, after = (placement.physical_to_logical_map[layer] for placement in (old, new))
        transfers = layer_transfers(before, after, self.topology)
        ends = [t.src_rank for t in transfers], [t.dst_rank for t in transfers]
        return max(ranks.count(rank) for ranks in ends for rank in range(self.topology.num_ranks)) * self.expert_nbytes


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast experts move beside serving.

    :param begin_at: boundary that the first update begins after
    :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each pass at most
    :param rest: boundaries from the end of an update to the next
    """

    begin_at: int
    max_nbytes_per_step: int
    rest: int


class Mode(NoUpdates):
    """Keeps the experts where they are.

    :param expert_map: what the model routes by
    """

    def __init__(self, experts: Experts, expert_map: ExpertMap) -> None:
        self.experts = experts
        self.expert_map = expert_map

    @asynccontextmanager
    async def active(self) -> AsyncIterator[None]:
        """Surround a run; when this is left, everything has been moved."""
        yield

    def statistics(self) -> UpdaterStatistics | None:
        """Return what an updater says of the run, where there is one."""
        return None


class Blocking(Mode):
    """What engines do themselves: at some boundaries, all layers are moved before the next pass.

    Layer by layer: plan in Python, post all sends and receives, wait, copy into live slots.

    :param group: for sends and receives only
    :param boundaries: where the experts go to the next target
    """

    def __init__(self, experts: Experts, expert_map: ExpertMap, group: ProcessGroup, boundaries: Sequence[int]) -> None:
        super().__init__(experts, expert_map)
        self._group = group
        self._moves = dict(zip(boundaries, experts.moves, strict=True))

    async def step(self, number: int, /) -> None:
        """Move all layers if it is time to, on the serving thread."""
        self.move(number)

    def move(self, number: int) -> None:
        """Do the same without an event loop."""
        if number in self._moves:
            old, new = self._moves[number]
            for layer in new.changed_layers(old):
                self._move(layer, old, new)

    @torch.no_grad()
    def _move(self, layer: int, old: ExpertPlacement, new: ExpertPlacement) -> None:
        experts = self.experts
        plan = experts.plan(layer, old, new)
        experts.copy_own(layer, plan)
        messages = experts.messages(layer, plan)
        operations = [
            dist.P2POp(function, message.data, message.peer, self._group, message.tag)
            for function, side in ((dist.irecv, messages.recvs), (dist.isend, messages.sends))
            for message in side
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        sources = [(slot, slot) for slot in plan.staged_slots]
        sources += [(fan_out.staged_slot, fan_out.dst_slot) for fan_out in plan.fan_outs]
        for staged_slot, live_slot in sources:
            live = experts.weights.slot_views(layer, live_slot)
            for view, staged in zip(live, experts.staged(staged_slot), strict=True):
                view.copy_(staged)
        self.expert_map.publish(layer, self.expert_map.staged(self.expert_map.layer_maps(new, layer)))


class Background(Mode):
    """Moves the experts beside serving, by the library."""

    def __init__(self, experts: Experts, group: ProcessGroup, pace: Pace) -> None:
        self._updater = ExpertUpdater(
            experts.weights,
            experts.placement,
            experts.topology,
            rank=experts.rank,
            transport=TorchDistTransport(group),
        )
        super().__init__(experts, self._updater.expert_map)
        self._pace = pace
        self._ended = anyio.Event()

    async def step(self, number: int, /) -> None:
        """Commit what is due."""
        await self._updater.step(number)

    @asynccontextmanager
    async def active(self) -> AsyncIterator[None]:
        """Run the updates beside the body."""
        async with self._updater, anyio.create_task_group() as tasks:
            tasks.start_soon(self._update)
            yield
            async with self._updater.idle():
                await self._ended.wait()

    def statistics(self) -> UpdaterStatistics:
        """Return what the updater says of the run."""
        return self._updater.statistics()

    async def _update(self) -> None:
        begin_at = self._pace.begin_at
        for _, target in self.experts.moves:
            await self._updater.demands.until_step(begin_at)
            await self._updater.begin(target, max_nbytes_per_step=self._pace.max_nbytes_per_step).wait()
            begin_at = self._updater.statistics().step + self._pace.rest
        self._ended.set()


class IntoScratch(Mode):
    """Moves the same bytes beside serving into memory that nobody reads: no agreement, no commit, no new map.

    The pace is that of :class:`Background`. Plans are made before the run.
    """

    def __init__(self, experts: Experts, expert_map: ExpertMap, group: ProcessGroup, pace: Pace) -> None:
        super().__init__(experts, expert_map)
        self._transport = TorchDistTransport(group)
        self._workers = ThreadWorkers()
        self._pace = pace
        self._plans = [
            [(layer, experts.plan(layer, old, new), experts.peak_nbytes(layer, old, new)) for layer in layers]
            for old, new in experts.moves
            if (layers := new.changed_layers(old))
        ]
        self._number = 0
        self._standing = False
        self._news = anyio.Event()

    async def step(self, number: int, /) -> None:
        """Let the transfers see how far the engine is."""
        self._number = number
        self._tell()

    @asynccontextmanager
    async def active(self) -> AsyncIterator[None]:
        """Move bytes beside the body."""
        await self._transport.open(CpuDevice(), self._workers, self.experts.weights, control_timeout_s=_TIMEOUT_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._transfer)
            yield
            self._standing = True
            self._tell()
        await self._transport.aclose()

    async def _transfer(self) -> None:
        begin_at = self._pace.begin_at
        for layers in self._plans:
            for layer, plan, peak_nbytes in layers:
                while self._number < begin_at and not self._standing:
                    await self._news.wait()
                begin_at = self._number + -(-peak_nbytes // self._pace.max_nbytes_per_step)
                await self._workers.run("transfer", partial(self.experts.copy_own, layer, plan))
                exchange = Exchange(layer, (self.experts.messages(layer, plan),))
                await self._transport.prepare(exchange).launch().wait(_TIMEOUT_S)
            begin_at += self._pace.rest

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
