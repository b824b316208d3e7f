"""The stages of one layer: plan, load, launch, receive, stage, copy, finish. The pipeline decides when each comes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from anyio import current_time
from torch import Tensor

from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.commit.committer import PreparedCommit
from async_eplb.device import DeviceEvent
from async_eplb.events.schema import LayerCommitted
from async_eplb.plan import PostedUpdate, plan_update
from async_eplb.staging import BufferState, StagingBuffer
from async_eplb.transport.base import PendingExchange, PreparedExchange, Transport
from async_eplb.transport.exchange import Exchange
from async_eplb.update.admission import Update
from async_eplb.update.exchange import exchanges
from async_eplb.update.journal import Journal
from async_eplb.update.layer import MOVING, Hop, LayerInFlight, PlannedLayer
from async_eplb.update.rank import Rank
from async_eplb.verify.column import Verify
from async_eplb.workers import Work


class LayerStages:
    """The stages of one update, for one rank."""

    def __init__(self, rank: Rank, update: Update, transport: Transport, journal: Journal) -> None:
        self._rank = rank
        self._update = update
        self._transport = transport
        self._journal = journal
        self._started: list[PendingExchange] = []
        self._posted: PostedUpdate | None = None

    @property
    def launch_rule(self) -> LaunchRule:
        """When a layer's exchange may be launched."""
        return self._transport.launch_rule

    @property
    def launches_at_steps(self) -> bool:
        """Whether transfers begin at agreed boundaries, on the serving thread."""
        return self.launch_rule.needs_order and self._update.mode is Mode.SERVING

    @property
    def callers_work(self) -> DeviceEvent:
        """Work of the caller that comes before live weights are read."""
        return self._update.after

    async def prepare(self) -> None:
        """Plan all of an update's layers.

        :raises UnheldExpert: if the new placement needs an expert that nobody holds
        """
        began_s = current_time()
        self._posted = await self._rank.workers.run(Work.TRANSFER, self._plan_update)
        self._journal.prepared(self._posted, began_s)

    async def plan(self, index: int) -> PlannedLayer:
        """Cut one layer out of the plan, and make its maps, in the planning thread."""
        began_s = current_time()
        rank, update, row = self._rank, self._update, self._update.rows[index]
        if self._posted is None:
            raise RuntimeError("the update is not prepared")
        layers = self._posted

        def cut() -> PlannedLayer:
            posted = layers[index]
            return PlannedLayer(
                row=row,
                posted=posted,
                maps=rank.expert_map.layer_maps(update.new, row),
                peak_nbytes=posted.num_busiest * sum(rank.weights.slot_nbytes(row)),
            )

        planned = await rank.workers.run(Work.PLAN, cut)
        self._journal.planned(planned, began_s)
        return planned

    async def load(self, planned: PlannedLayer, buffer: StagingBuffer) -> LayerInFlight:
        """Lay out a layer's staging, fill it from this rank's own slots, and prepare its exchange."""
        rank, row = self._rank, planned.row

        def fill() -> tuple[tuple[Hop, ...], PreparedCommit]:
            buffer.lay_out(planned.plan.staged_slots, rank.weights.slot_nbytes(row))
            hops = exchanges(
                planned,
                buffer,
                rank.weights,
                one_sided=self._transport.one_sided_peers,
                in_turn=self._update.mode is Mode.EXCLUSIVE,
            )
            with rank.device.transferring(), torch.no_grad():
                rank.device.wait(self.callers_work)
                rank.device.wait(buffer.consumed)  # rule 5
                prepared = tuple(Hop(tuple(map(self._transport.prepare, self._parts(hop)))) for hop in hops)
                self._mark(planned, buffer)
                commit = rank.committer.prepare(row, planned.plan, buffer, planned.maps)
                if self.launch_rule is not LaunchRule.ORDERED:
                    rank.device.record().synchronize()  # rule 11: peers may read what this rank offers at once
            return prepared, commit

        return LayerInFlight(planned, buffer, *await rank.workers.run(Work.TRANSFER, fill))

    def launch(self, hop: Hop, part: PreparedExchange) -> None:
        """Post one part of an exchange, behind the transfer stream, in the thread whose launches are ordered.

        :raises BrokenTransport: if the transport failed or is not open any more
        """
        with self._rank.device.transferring():
            hop.pending.append(part.launch())

    async def launch_from_background(self, layer: LayerInFlight) -> None:
        """Post a layer's hops beside whatever the model does."""

        def launch_all() -> None:
            for hop in layer.hops:
                for part in hop.parts:
                    self.launch(hop, part)

        if self.launch_rule.needs_order:
            await self._rank.workers.run(Work.TRANSFER, launch_all)
        else:
            launch_all()

    async def start(self, layer: LayerInFlight) -> None:
        """Do for a layer's launched first hop what need not wait until the layer before has arrived.

        :raises BrokenTransport: if the exchange fails
        """
        for pending in layer.hops[0].pending:
            self._started.append(pending)
            await pending.start()

    async def receive(self, layer: LayerInFlight, hop: int) -> None:
        """Wait until a launched hop has arrived.

        :raises BrokenTransport: if the exchange fails
        """
        deadline = self._deadline_s()  # rule 9: a posted exchange is shielded, and has a deadline
        for pending in layer.hops[hop].pending:
            await pending.wait(max(deadline - current_time(), 0.001))
            if hop == 0:
                self._started.remove(pending)

    async def settle(self) -> None:
        """Wait for exchanges that were started and have not arrived: they may write to staging until then."""
        deadline = self._deadline_s()
        for pending in self._started:
            with suppress(Exception):  # the update has failed already
                await pending.wait(max(deadline - current_time(), 0.001))
        self._started.clear()

    async def stage(self, layer: LayerInFlight) -> None:
        """Mark a layer whose hops have all arrived as staged, after its slots were verified.

        :raises VerificationError: if something else arrived than should have
        """
        if self._rank.verifier.mode is not Verify.OFF:
            await self._rank.workers.run(Work.CHECK, lambda: self._check_staged(layer))
        layer.buffer.enter(BufferState.STAGED)
        self._journal.transferred(layer)

    @contextmanager
    def beside(self, after: DeviceEvent) -> Iterator[None]:
        """Run the body on the commit stream, behind ``after``; return when the device has done it."""
        device = self._rank.device
        with device.committing():
            device.wait(after)
            yield
            device.record().synchronize()

    def copy(self, layer: LayerInFlight, *, step: int) -> None:
        """Enqueue a layer's commit on the current stream; the layer is staged on every rank (rule 1)."""
        start = time.perf_counter()
        try:
            layer.nbytes = layer.commit.run()
        except BaseException:
            if layer.buffer.state is BufferState.COMMITTING:
                layer.buffer.enter(BufferState.STAGED)
            raise
        layer.buffer.consumed = self._rank.device.record()
        layer.step = step
        layer.copy_ms = (time.perf_counter() - start) * 1e3

    async def finish(self, layer: LayerInFlight, began_s: float | None = None) -> LayerCommitted:
        """Wait until a commit is done on the device; return what it did.

        :param began_s: when it began, on the event loop's clock; now, if it is not given
        :raises VerificationError: if live slots are not what was staged
        """
        began_s = current_time() if began_s is None else began_s

        def complete() -> None:
            layer.buffer.consumed.synchronize()
            self._check_live(layer)

        turn_s = self._journal.commit_turn_s(began_s)
        if self._rank.verifier.mode is not Verify.OFF or not layer.buffer.consumed.query():  # rule 3: a look is free
            await self._rank.workers.run(Work.FINISH, complete)
        return self._journal.committed(layer, turn_s)

    def _parts(self, hop: Exchange) -> tuple[Exchange, ...]:
        """Return what is launched at one boundary each, or the whole hop where launches are not at boundaries."""
        return hop.parts() if self.launches_at_steps else (hop,)

    def _deadline_s(self) -> float:
        return current_time() + self._rank.options.transfer_timeout_s

    def _plan_update(self) -> PostedUpdate:
        rank, update = self._rank, self._update
        plan = plan_update(
            update.old, update.new, rank.topology, rank.number, layers=update.rows, planner=rank.options.planner
        )
        num_tensors = [len(rank.weights.slot_nbytes(row)) for row in update.rows]
        return PostedUpdate(plan, [max(1, rank.options.operations_per_group // number) for number in num_tensors])

    def _mark(self, planned: PlannedLayer, buffer: StagingBuffer) -> None:
        experts = self._update.old.physical_to_logical_map[planned.row, self._rank.slots]
        moving = {send.src_slot for send in planned.plan.sends}
        moving |= {copy.src_slot for copy in planned.plan.local_copies}
        self._rank.verifier.mark(planned.row, experts, sorted(moving), buffer.scratch)

    def _check_staged(self, layer: LayerInFlight) -> None:
        planned = layer.planned
        content = {slot: layer.buffer.views(slot) for slot in planned.plan.staged_slots}
        with self._rank.device.committing():  # the transfer stream may be behind the next layer's first hop
            self._check(layer, content, "staged")

    def _check_live(self, layer: LayerInFlight) -> None:
        if self._rank.verifier.mode is Verify.OFF:
            return
        planned = layer.planned
        sources = enumerate(planned.plan.slot_sources)
        weights = self._rank.weights
        content = {slot: weights.slot_views(planned.row, slot) for slot, source in sources if source in MOVING}
        with self._rank.device.committing():
            self._check(layer, content, "live")

    def _check(self, layer: LayerInFlight, content: Mapping[int, Sequence[Tensor]], where: str) -> None:
        row = layer.planned.row
        experts = dict(enumerate(self._update.new.physical_to_logical_map[row, self._rank.slots].tolist()))
        self._rank.verifier.check(row, experts, content, where, layer.buffer.scratch)
