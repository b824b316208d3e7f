"""What happens to one layer: plan, load, launch, receive, stage, copy, finish. The pipeline decides when."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from anyio import current_time
from torch import Tensor

from async_eplb.agreement.ballot import Ballot
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.commit.committer import Committer
from async_eplb.device import Device, DeviceEvent
from async_eplb.errors import UpdateStalled
from async_eplb.events.emit import Logger, emit
from async_eplb.events.schema import LayerCommitted, LayerDecided, LayerPlanned, UpdateInputsLogged, UpdateStarted
from async_eplb.events.schema import UpdateStalled as UpdateStalledEvent
from async_eplb.events.stopwatch import Stopwatch
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import LayerPlan, PostedLayer, PostedUpdate, SlotSource, plan_update
from async_eplb.staging import BufferState, StagingBuffer, StagingPool
from async_eplb.topology import EPTopology
from async_eplb.transport.base import PendingExchange, PreparedExchange, Transport
from async_eplb.transport.exchange import Exchange, Message, MessageGroup, Pull, Pulls
from async_eplb.update.journal import transfer_event
from async_eplb.update.summary import Tally
from async_eplb.update.watchdog import Activity
from async_eplb.verify.column import Verifier, Verify
from async_eplb.workers import Workers


@dataclass(frozen=True, slots=True, eq=False)
class PlannedLayer:
    """A layer with all that is known before its bytes move."""

    row: int
    posted: PostedLayer
    maps: LayerMaps
    peak_nbytes: int
    """Bytes that the busiest rank sends or receives, equal on all ranks"""

    @property
    def plan(self) -> LayerPlan:
        """What this rank sends, receives and copies."""
        return self.posted.plan


@dataclass(slots=True, eq=False)
class LayerInFlight:
    """A layer that has a staging buffer, until its commit has finished on the device."""

    planned: PlannedLayer
    buffer: StagingBuffer
    hops: tuple[tuple[PreparedExchange, ...], ...]
    """The transfer and then, where the planner relays, the relays: each as the parts that are launched one by one."""
    commit: Callable[[], int]
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Started anew when its transfer's turn came, and when it was staged."""
    pending: tuple[list[PendingExchange], ...] = field(init=False)
    """The launched parts of each hop."""
    copy_ms: float = 0.0
    """Host time of enqueuing the commit copies."""
    nbytes: int = 0
    """Bytes that the commit wrote to live weights."""
    step: int = 0
    """Boundary that the layer was committed at; 0 in the exclusive mode."""

    def __post_init__(self) -> None:
        self.pending = tuple([] for _ in self.hops)

    @property
    def parts(self) -> tuple[tuple[int, PreparedExchange], ...]:
        """Hop and exchange of each part, in the order of launches."""
        return tuple((hop, part) for hop, parts in enumerate(self.hops) for part in parts)

    def is_launched(self, hop: int) -> bool:
        """Whether all parts of a hop are."""
        return len(self.pending[hop]) == len(self.hops[hop])


class LayerStages:
    """The stages of one update, for one rank.

    :param old: placement that the live weights have
    :param new: placement that they shall have
    :param mode: whether the model serves meanwhile
    :param after: work of the caller that comes before live weights are read
    :param step: returns how many boundaries this rank has passed
    """

    def __init__(
        self,
        *,
        generation: int,
        rank: int,
        old: ExpertPlacement,
        new: ExpertPlacement,
        mode: Mode,
        topology: EPTopology,
        verifier: Verifier,
        expert_map: ExpertMap,
        committer: Committer,
        transport: Transport,
        device: Device,
        workers: Workers,
        logger: Logger,
        options: UpdateOptions,
        after: DeviceEvent,
        step: Callable[[], int],
    ) -> None:
        self.tally = Tally()
        self._generation = generation
        self.rank = rank
        self._old = old
        self._new = new
        self.mode = mode
        self._topology = topology
        self._verifier = verifier
        self._weights = verifier.weights
        self._expert_map = expert_map
        self._committer = committer
        self._transport = transport
        self._device = device
        self._workers = workers
        self._logger = logger
        self._options = options
        self.callers_work = after
        self.step = step
        self._rows: tuple[int, ...] = ()
        self._started: list[PendingExchange] = []
        self._update: PostedUpdate | None = None

    @property
    def launch_rule(self) -> LaunchRule:
        """When a layer's exchange may be launched."""
        return self._transport.launch_rule

    @property
    def launches_at_steps(self) -> bool:
        """Whether exchanges are launched part by part at agreed boundaries."""
        return self.launch_rule.needs_order and self.mode is Mode.SERVING

    async def prepare(self, pool: StagingPool, rows: Sequence[int]) -> None:
        """Plan all of an update's layers, ``rows``, and make staging hold the slots that change in any of them.

        :raises UnheldExpert: if the new placement needs an expert that nobody holds
        """
        watch = self._since_staged = self._since_committed = Stopwatch()
        self._rows = tuple(rows)
        self._update = await self._workers.run("transfer", self._plan_update)
        self.tally.plan_ms += watch.ms()
        counts = self._update.plan.staged_slot_counts
        needed = max(
            (
                StagingPool.layer_nbytes(
                    count, self._weights.slot_nbytes(row), spare_nbytes=self._committer.spare_nbytes(row)
                )
                for row, count in zip(rows, counts, strict=True)
            ),
            default=0,
        )
        await self._workers.run("transfer", lambda: pool.reserve(needed))

    def abort(self) -> None:
        """Break the transport, so that no rank waits for an exchange that cannot finish."""
        self._transport.abort()

    def log_start(self, pool: StagingPool, rows: Sequence[int]) -> None:
        """Say that the update begins."""
        emit(
            self._logger,
            UpdateStarted(
                generation=self._generation,
                rank=self.rank,
                step=self.step(),
                mode=self.mode.value,
                num_ranks=self._topology.num_ranks,
                num_nodes=self._topology.num_nodes,
                num_layers=len(rows),
                num_unchanged_layers=self._old.num_layers - len(rows),
                staging_nbytes=pool.nbytes,
            ),
        )
        if self._options.log_inputs:
            emit(
                self._logger,
                UpdateInputsLogged(
                    generation=self._generation,
                    rank=self.rank,
                    step=self.step(),
                    num_ranks=self._topology.num_ranks,
                    num_nodes=self._topology.num_nodes,
                    num_ranks_per_node=self._topology.num_ranks_per_node,
                    num_local_physical_experts=self._topology.num_local_physical_experts,
                    weight_shapes={row: self._weights.shapes(row) for row in rows},
                    staged_slots=self._planned_update.plan.staged_slot_counts,
                    layers=list(rows),
                    old_physical_to_logical_map=self._old.physical_to_logical_map[list(rows)].tolist(),
                    new_physical_to_logical_map=self._new.physical_to_logical_map[list(rows)].tolist(),
                ),
            )

    def log_stall(
        self, error: UpdateStalled, activities: Sequence[Activity], pool: StagingPool, ballots: Sequence[Ballot]
    ) -> None:
        """Say that a stage makes no progress, and what all stages and ranks do."""
        emit(
            self._logger,
            UpdateStalledEvent(
                generation=self._generation,
                rank=self.rank,
                step=self.step(),
                layer=error.layer,
                stage=error.stage,
                doing=error.doing,
                duration_ms=error.timeout_s * 1e3,
                stages=[str(activity) for activity in activities],
                buffers=[repr(buffer) for buffer in pool.buffers],
                rank_states=[ballot.describe() for ballot in ballots],
            ),
        )

    async def plan(self, row: int) -> PlannedLayer:
        """Plan a layer in the planning thread."""
        watch = Stopwatch()

        def make_plan() -> PlannedLayer:
            with self._device.transferring():
                return self._plan(row)

        planned = await self._workers.run("plan", make_plan)
        duration_ms = watch.ms()
        self.tally.plan_ms += duration_ms
        counts = planned.plan.source_counts
        emit(
            self._logger,
            LayerPlanned(
                generation=self._generation,
                rank=self.rank,
                layer=row,
                step=self.step(),
                duration_ms=duration_ms,
                num_same_gpu=counts[SlotSource.SAME_GPU],
                num_free_rider=counts[SlotSource.FREE_RIDER],
                num_same_node=counts[SlotSource.SAME_NODE],
                num_cross_node=counts[SlotSource.CROSS_NODE],
                num_sends=len(planned.plan.sends) + len(planned.plan.relays),
            ),
        )
        if self._options.log_decisions:
            emit(self._logger, self._decisions(planned))
        return planned

    async def load(self, planned: PlannedLayer, buffer: StagingBuffer) -> LayerInFlight:
        """Lay out a layer's staging, fill it from this rank's own slots, and prepare its exchange."""

        def fill() -> tuple[tuple[tuple[PreparedExchange, ...], ...], Callable[[], int]]:
            buffer.lay_out(
                planned.plan.staged_slots,
                self._weights.slot_nbytes(planned.row),
                spare_nbytes=self._committer.spare_nbytes(planned.row),
            )
            hops = [hop.parts() if self.launches_at_steps else (hop,) for hop in self._hops(planned, buffer)]
            with self._device.transferring(), torch.no_grad():
                self._device.wait(self.callers_work)
                self._device.wait(buffer.consumed)
                prepared = tuple(tuple(self._transport.prepare(part) for part in parts) for parts in hops)
                self._mark(planned)
                commit = self._committer.prepare(planned.row, planned.plan, buffer, planned.maps)
                if self.launch_rule is not LaunchRule.ORDERED:
                    self._device.record().synchronize()
            return prepared, commit

        return LayerInFlight(planned, buffer, *await self._workers.run("transfer", fill))

    def launch(self, layer: LayerInFlight, hop: int, part: PreparedExchange) -> None:
        """Post one part of a layer's exchange, behind the transfer stream, in the thread whose launches are ordered.

        :raises BrokenTransport: if the transport is not open
        """
        with self._device.transferring():
            layer.pending[hop].append(part.launch())

    async def launch_from_background(self, layer: LayerInFlight) -> None:
        """Post a layer's hops beside whatever the model does."""

        def launch_all() -> None:
            for hop, part in layer.parts:
                self.launch(layer, hop, part)

        if self.launch_rule.needs_order:
            await self._workers.run("transfer", launch_all)
        else:
            launch_all()

    async def start(self, layer: LayerInFlight) -> None:
        """Do for a layer's launched first hop what need not wait until the layer before has arrived.

        :raises BrokenTransport: if the exchange fails
        """
        for pending in layer.pending[0]:
            self._started.append(pending)
            await pending.start()

    async def receive(self, layer: LayerInFlight, hop: int) -> None:
        """Wait until a launched hop has arrived.

        :raises BrokenTransport: if the exchange fails
        """
        deadline = current_time() + self._options.transfer_timeout_s
        for pending in layer.pending[hop]:
            await pending.wait(max(deadline - current_time(), 0.001))
            if hop == 0:
                self._started.remove(pending)

    async def settle(self) -> None:
        """Wait for what was started and has not arrived, for it may write to staging until then."""
        deadline = current_time() + self._options.transfer_timeout_s
        for pending in self._started:
            with suppress(Exception):  # the update has failed already
                await pending.wait(max(deadline - current_time(), 0.001))
        self._started.clear()

    async def stage(self, layer: LayerInFlight) -> None:
        """Take a layer whose hops have all arrived for staged, if what it holds is right.

        :raises VerificationError: if something else arrived than should have
        """
        if self._verifier.mode is not Verify.OFF:
            await self._workers.run("check", lambda: self._check_staged(layer))
        layer.buffer.enter(BufferState.STAGED)
        event = transfer_event(
            layer.planned.plan,
            self._topology,
            self.rank,
            layer=layer.planned.row,
            generation=self._generation,
            step=self.step(),
            expert_nbytes=sum(self._weights.slot_nbytes(layer.planned.row)),
            ms=min(layer.watch.ms(), self._since_staged.ms()),
        )
        self.tally.add_transfer(event)
        emit(self._logger, event)
        layer.watch = self._since_staged = Stopwatch()

    @contextmanager
    def beside(self, after: DeviceEvent) -> Iterator[None]:
        """Run what is inside on the commit stream, behind ``after``; return when the device has done it."""
        with self._device.committing():
            self._device.wait(after)
            yield
            self._device.record().synchronize()

    def copy(self, layer: LayerInFlight, *, step: int) -> None:
        """Enqueue a layer's commit on the current stream; the layer is staged on every rank."""
        start = time.perf_counter()
        try:
            layer.nbytes = layer.commit()
        except BaseException:
            if layer.buffer.state is BufferState.COMMITTING:
                layer.buffer.enter(BufferState.STAGED)
            raise
        layer.buffer.consumed = self._device.record()
        layer.step = step
        layer.copy_ms = (time.perf_counter() - start) * 1e3

    async def finish(self, layer: LayerInFlight, watch: Stopwatch) -> LayerCommitted:
        """Wait until a commit has finished on the device; return what it did.

        :param watch: started with the commit
        :raises VerificationError: if live slots are not what was staged
        """

        def complete() -> None:
            layer.buffer.consumed.synchronize()
            self._check_live(layer.planned)

        watch = min(watch, self._since_committed, key=Stopwatch.ms)
        wait_ms = layer.watch.ms() - watch.ms()
        if self._verifier.mode is not Verify.OFF or not layer.buffer.consumed.query():
            await self._workers.run("finish", complete)
        counts = layer.planned.plan.source_counts
        moved = {source: count for source, count in counts.items() if count and source in _MOVING}
        committed = LayerCommitted(
            generation=self._generation,
            rank=self.rank,
            layer=layer.planned.row,
            step=layer.step,
            duration_ms=watch.ms(),
            copy_ms=layer.copy_ms,
            wait_ms=wait_ms,
            num_slots=sum(moved.values()),
            nbytes=layer.nbytes,
        )
        self.tally.commit_ms += committed.duration_ms
        self.tally.wait_ms += wait_ms
        for source, count in moved.items():
            self.tally.nbytes_by_source[source] += layer.nbytes // committed.num_slots * count
        emit(self._logger, committed)
        self._since_committed = Stopwatch()
        return committed

    @property
    def _planned_update(self) -> PostedUpdate:
        if self._update is None:
            raise RuntimeError("the update is not prepared")
        return self._update

    def _plan_update(self) -> PostedUpdate:
        plan = plan_update(
            self._old, self._new, self._topology, self.rank, layers=self._rows, planner=self._options.planner
        )
        num_tensors = [len(self._weights.slot_nbytes(row)) for row in self._rows]
        return PostedUpdate(plan, [max(1, self._options.operations_per_group // number) for number in num_tensors])

    def _plan(self, row: int) -> PlannedLayer:
        posted = self._planned_update[self._rows.index(row)]
        return PlannedLayer(
            row=row,
            posted=posted,
            maps=self._expert_map.layer_maps(self._new, row),
            peak_nbytes=posted.num_busiest * sum(self._weights.slot_nbytes(row)),
        )

    def _hops(self, planned: PlannedLayer, buffer: StagingBuffer) -> tuple[Exchange, ...]:
        posted, plan = planned.posted, planned.plan
        one_sided = self._transport.one_sided_peers
        pulls: list[Pull] = []
        sends: list[list[Message]] = [[] for _ in range(posted.num_groups)]
        recvs: list[list[Message]] = [[] for _ in range(posted.num_groups)]

        def tagged(expert: int, peer: int, parts: tuple[Tensor, ...]) -> Iterator[Message]:
            for index, data in enumerate(parts):
                yield Message(peer, expert * len(parts) + index, data)

        for send, group in zip(plan.sends, posted.send_groups, strict=True):
            if send.dst_rank not in one_sided:
                live = self._weights.slot_views(planned.row, send.src_slot)
                sends[group] += tagged(send.logical_expert, send.dst_rank, live)
        for relay, group in zip(plan.relays, posted.relay_groups, strict=True):
            staged = buffer.views(relay.src_slot)
            sends[group] += tagged(relay.logical_expert, relay.dst_rank, staged)
        incoming = zip(plan.recvs, posted.recv_groups, posted.recv_src_slots, strict=True)
        for recv, group, slot in sorted(incoming, key=lambda entry: entry[0].logical_expert):
            if recv.src_rank in one_sided:
                pulls.append(Pull(recv.src_rank, slot, recv.dst_slot))
            else:
                recvs[group] += tagged(recv.logical_expert, recv.src_rank, buffer.views(recv.dst_slot))
        groups = tuple(MessageGroup(tuple(s), tuple(r)) for s, r in zip(sends, recvs, strict=True))
        first, second = groups[: posted.num_first], groups[posted.num_first :]
        in_turn = bool(one_sided) and self.mode is Mode.EXCLUSIVE
        has_part = in_turn or bool(pulls)
        exchange = Exchange(planned.row, first, pulls=Pulls(tuple(pulls), buffer, in_turn) if has_part else None)
        return (exchange, Exchange(planned.row, second, hop=1)) if second else (exchange,)

    def _mark(self, planned: PlannedLayer) -> None:
        experts = self._old.physical_to_logical_map[planned.row, self._topology.slots_of(self.rank)]
        moving = {send.src_slot for send in planned.plan.sends}
        moving |= {copy.src_slot for copy in planned.plan.local_copies}
        self._verifier.mark(planned.row, experts, sorted(moving))

    def _check_staged(self, layer: LayerInFlight) -> None:
        planned = layer.planned
        content = {slot: layer.buffer.views(slot) for slot in planned.plan.staged_slots}
        with self._device.committing():  # the transfer stream may be behind the next layer's first hop
            self._verifier.check(planned.row, self._experts(planned), content, "staged")

    def _check_live(self, planned: PlannedLayer) -> None:
        if self._verifier.mode is Verify.OFF:
            return
        sources = enumerate(planned.plan.slot_sources)
        content = {slot: self._weights.slot_views(planned.row, slot) for slot, source in sources if source in _MOVING}
        with self._device.committing():
            self._verifier.check(planned.row, self._experts(planned), content, "live")

    def _experts(self, planned: PlannedLayer) -> dict[int, int]:
        local = self._new.physical_to_logical_map[planned.row, self._topology.slots_of(self.rank)]
        return dict(enumerate(local.tolist()))

    def _decisions(self, planned: PlannedLayer) -> LayerDecided:
        plan = planned.plan
        return LayerDecided(
            generation=self._generation,
            rank=self.rank,
            layer=planned.row,
            step=self.step(),
            slot_sources=[source.value for source in plan.slot_sources],
            local_copies=[copy._asdict() for copy in plan.local_copies],
            recvs=[recv._asdict() for recv in plan.recvs],
            sends=[send._asdict() for send in plan.sends],
            fan_outs=[fan_out._asdict() for fan_out in plan.fan_outs],
            relays=[relay._asdict() for relay in plan.relays],
        )


_MOVING = frozenset({SlotSource.SAME_GPU, SlotSource.FREE_RIDER, SlotSource.SAME_NODE, SlotSource.CROSS_NODE})
