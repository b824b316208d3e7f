"""The façade: move live expert weights to a new placement."""

import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from anyio import CancelScope, create_memory_object_stream, get_cancelled_exc_class

from async_eplb.agreement import Agreement
from async_eplb.device import Device, device_for
from async_eplb.errors import (
    BusyUpdater,
    ClosedUpdater,
    InvalidOptions,
    InvalidPlacement,
    LayerCountMismatch,
    MissingWeights,
    RankMismatch,
    SlotCountMismatch,
    UnplacedExpert,
)
from async_eplb.events import (
    Event,
    LayerCommitted,
    Logger,
    UpdateFailed,
    UpdateFinished,
    default_logger,
    emit,
)
from async_eplb.expert_map import ExpertMap
from async_eplb.options import UpdateOptions
from async_eplb.pipeline import LayerPipeline, UpdateRun
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import SlotSource
from async_eplb.stages import LayerStages
from async_eplb.staging import StagingPool
from async_eplb.topology import EPTopology
from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.verify import Verifier, Verify
from async_eplb.weights import ExpertWeights
from async_eplb.workers import ThreadWorkers, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSummary:
    """What an update did, seen from one rank. Times are in milliseconds, of all layers together.

    :param overlap: time of the stages over the duration: 1 if one ran after another, 3 if all ran all the time
    :param nbytes_by_source: bytes written to live weights, by where they came from
    """

    generation: int
    layers: tuple[int, ...]
    num_unchanged_layers: int
    duration_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    overlap: float
    nbytes_by_source: dict[SlotSource, int]
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int


class ExpertUpdater:
    """Moves the expert weights of one model to new placements, with the other ranks of its EP group.

    An async context manager: entering connects, which all ranks do together; leaving waits for a running update
    to end, cancelled. Enter and leave it in the same task.

    :param weights: live weights of this rank
    :param placement: the placement that they have now
    :param topology: shape of the EP group
    :param rank: this process in the EP group
    :param transport: an unused transport of that group; the updater opens and closes it
    :param logger: structlog logger for events; the application's without it
    :param workers: where blocking work runs; threads without it
    :param device: streams and events; the device of the weights without it
    :raises EplbError: if these do not fit together; see :mod:`async_eplb.errors` for each way
    """

    def __init__(
        self,
        weights: ExpertWeights,
        placement: ExpertPlacement,
        topology: EPTopology,
        *,
        rank: int,
        transport: Transport,
        options: UpdateOptions | None = None,
        logger: Logger | None = None,
        workers: Workers | None = None,
        device: Device | None = None,
    ) -> None:
        self.options = options or UpdateOptions()
        _require_ranks(topology, rank, transport)
        placement.require_fit(topology)
        _require_slots(weights, placement, topology)
        self.topology = topology
        self.rank = rank
        self._placement = placement
        self._device = device or device_for(weights.device)
        self._workers = workers or ThreadWorkers()
        self._logger = logger or default_logger()
        self._verifier = Verifier(Verify(self.options.verify), weights, rank)
        _require_groups(self._verifier.weights, self.options)
        self._transport = transport
        self.expert_map = ExpertMap(
            placement,
            topology,
            rank=rank,
            device=weights.device,
            max_replicas=self.options.max_replicas,
            seed=self.options.dispatch_seed,
        )
        self._pool = StagingPool(self.options.staging_depth, self._device)
        self._stack = AsyncExitStack()
        self._control: ControlGroup | None = None
        self._pipeline = LayerPipeline()
        self._closed_because = "it was not entered yet"
        self._run: UpdateRun | None = None
        self._generation = 0

    def __repr__(self) -> str:
        state = f"closed: {self._closed_because}" if self._closed_because else "updating" if self._run else "idle"
        return f"<ExpertUpdater rank {self.rank} of {self.topology.num_ranks}, generation {self._generation}, {state}>"

    @property
    def placement(self) -> ExpertPlacement:
        """The placement that the live weights have, as far as committed."""
        return self._placement

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._pipeline)
            stack.push_async_callback(self._close_transport)
            self._control = await self._transport.open(
                self._device, self._workers, control_timeout_s=self.options.control_timeout_s
            )
            self._closed_because = ""
            stack.push_async_callback(self._end_running_update)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._closed_because = self._closed_because or "it was left"
        return await self._stack.__aexit__(kind, error, traceback)

    async def update(self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None) -> UpdateSummary:
        """Move the weights to a new placement; return when all layers are committed on every rank.

        All ranks call this with equal arguments, none of them serving meanwhile. If the awaiting task is
        cancelled, layers that may be under way are still committed, on all ranks the same ones, before the
        cancellation goes on.

        :param layers: rows to update; all without it
        :raises EplbError: see :mod:`async_eplb.errors`; what was refused has changed nothing, and what ended
            early says which layers were committed
        """
        run = self._begin(new_placement, layers, lambda _: None, lambda: None)
        await self._join(run)
        return self._summary(run)

    async def stream(
        self, new_placement: ExpertPlacement, *, layers: Iterable[int] | None = None
    ) -> AsyncIterator[LayerCommitted]:
        """Do what :meth:`update` does, and yield each layer as it lands on this rank.

        Leaving the loop early cancels the update (close the iterator, as with ``contextlib.aclosing``).
        """
        sender, receiver = create_memory_object_stream[LayerCommitted](math.inf)
        run = self._begin(new_placement, layers, sender.send_nowait, sender.close)
        with receiver:
            try:
                async for committed in receiver:
                    yield committed
            finally:
                if not run.finished.is_set():
                    run.cancel()
                await self._join(run)
        self._summary(run)

    def _begin(
        self,
        new_placement: ExpertPlacement,
        layers: Iterable[int] | None,
        on_commit: Callable[[LayerCommitted], None],
        on_finish: Callable[[], None],
    ) -> UpdateRun:
        if self._closed_because or self._control is None:
            raise ClosedUpdater(f"{self!r} cannot update")
        if self._run is not None:
            raise BusyUpdater(f"{self!r}: wait for the running update before the next one")
        rows = self._validated_rows(new_placement, layers)
        generation = self._generation + 1
        stages = LayerStages(
            generation=generation,
            rank=self.rank,
            old=self._placement,
            new=new_placement,
            topology=self.topology,
            verifier=self._verifier,
            expert_map=self.expert_map,
            transport=self._transport,
            device=self._device,
            workers=self._workers,
            logger=self._logger,
            options=self.options,
        )
        agreement = Agreement(
            generation=generation,
            digest=self._digest(new_placement, rows),
            total=len(rows),
            window=self.options.staging_depth,
        )

        def finish(run: UpdateRun) -> None:
            self._finish(run, new_placement)
            on_finish()

        run = UpdateRun(
            stages=stages,
            rows=rows,
            agreement=agreement,
            control=self._control,
            pool=self._pool,
            on_commit=on_commit,
            on_finish=finish,
        )
        self._run = run
        self._generation = generation
        self._pipeline.start(run)
        return run

    def _finish(self, run: UpdateRun, new_placement: ExpertPlacement) -> None:
        """Take over what an update has committed, and say how it ended."""
        self._run = None
        self._placement = self._placement.with_layers(new_placement, tuple(run.committed))
        if run.broke:
            self._closed_because = f"an update failed with {type(run.error).__name__}"
        emit(self._logger, self._ending(run))

    def _ending(self, run: UpdateRun) -> Event:
        if run.error is not None:
            return UpdateFailed(
                generation=self._generation,
                rank=self.rank,
                duration_ms=run.duration_ms,
                error=type(run.error).__name__,
                error_message=str(run.error),
                committed_layers=run.committed,
            )
        tally = run.stages.tally
        return UpdateFinished(
            generation=self._generation,
            rank=self.rank,
            num_layers=len(run.rows),
            duration_ms=run.duration_ms,
            overlap=tally.overlap(run.duration_ms),
            **tally.numbers(),
        )

    def _summary(self, run: UpdateRun) -> UpdateSummary:
        if run.error is not None:
            raise run.error
        tally = run.stages.tally
        return UpdateSummary(
            generation=run.agreement.generation,
            layers=run.rows,
            num_unchanged_layers=self._placement.num_layers - len(run.rows),
            duration_ms=run.duration_ms,
            overlap=tally.overlap(run.duration_ms),
            nbytes_by_source=dict(tally.nbytes_by_source),
            **tally.numbers(),
        )

    @staticmethod
    async def _join(run: UpdateRun) -> None:
        """Wait for the end of an update; if this is cancelled, for the end of the cancelled update."""
        try:
            await run.finished.wait()
        except get_cancelled_exc_class():
            run.cancel()
            with CancelScope(shield=True):
                await run.finished.wait()
            raise

    async def _end_running_update(self) -> None:
        if self._run is not None:
            self._run.cancel()
            with CancelScope(shield=True):
                await self._run.finished.wait()

    async def _close_transport(self) -> None:
        self._control = None
        with CancelScope(shield=True):
            await self._transport.aclose()

    def _validated_rows(self, new: ExpertPlacement, layers: Iterable[int] | None) -> tuple[int, ...]:
        """Return the layers that an update changes, after all checks that need no other rank."""
        old = self._placement
        if new.num_layers != old.num_layers:
            raise LayerCountMismatch(
                f"the new placement has {new.num_layers} layers, the current one {old.num_layers}",
                expected=old.num_layers,
                actual=new.num_layers,
            )
        if new.num_logical_experts != old.num_logical_experts:
            raise InvalidPlacement(
                f"the new placement is for {new.num_logical_experts} logical experts, the current one for "
                f"{old.num_logical_experts}",
            )
        new.require_fit(self.topology)
        changed = new.changed_layers(old)
        if layers is not None:
            chosen = frozenset(layers)
            beyond = sorted(chosen - frozenset(range(old.num_layers)))
            if beyond:
                raise MissingWeights(
                    f"layers {beyond} are not rows of the placement, which has {old.num_layers}",
                    layer=beyond[0],
                )
            changed = tuple(row for row in changed if row in chosen)
        for row in changed if layers is None else sorted(chosen):
            if row not in self._verifier.weights.rows:
                raise MissingWeights(
                    f"layer {row} is to be updated, but the updater was given no weights for it", layer=row
                )
        for row, missing in new.unplaced().items():
            if row in changed:
                raise UnplacedExpert(
                    f"layer {row}: logical experts {list(missing)} have no replica in the new placement",
                    layer=row,
                    logical_experts=missing,
                )
        self.expert_map.require_room(new)
        return changed

    def _digest(self, new: ExpertPlacement, rows: tuple[int, ...]) -> int:
        """Condense what must be equal on all ranks into 63 bits."""
        wire = (self.options.verify, self.options.staging_depth, self.options.operations_per_group)
        content = hashlib.blake2b(digest_size=8)
        for part in (self._placement.digest(), new.digest(), self._verifier.weights.digest()):
            content.update(part)
        content.update(repr((self.topology, rows, wire)).encode())
        return int.from_bytes(content.digest()) >> 1


def _require_ranks(topology: EPTopology, rank: int, transport: Transport) -> None:
    for what, expected, actual in (
        ("ranks", topology.num_ranks, transport.num_ranks),
        ("rank", rank, transport.rank),
    ):
        if expected != actual:
            raise RankMismatch(
                f"{what} is {expected} for the updater and {actual} for its transport's group; "
                "the number of ranks cannot change while an updater lives",
                expected=expected,
                actual=actual,
            )


def _require_slots(weights: ExpertWeights, placement: ExpertPlacement, topology: EPTopology) -> None:
    if weights.num_local_physical_experts != topology.num_local_physical_experts:
        raise SlotCountMismatch(
            f"the weights' first dimension is {weights.num_local_physical_experts}, but each rank has "
            f"{topology.num_local_physical_experts} local physical experts",
            tensor="all",
            expected=topology.num_local_physical_experts,
            actual=weights.num_local_physical_experts,
        )
    beyond = [row for row in weights.rows if not 0 <= row < placement.num_layers]
    if beyond:
        raise InvalidPlacement(
            f"there are weights for rows {beyond}, but the placement has rows 0 to {placement.num_layers - 1}"
        )


def _require_groups(weights: ExpertWeights, options: UpdateOptions) -> None:
    widest = max(len(weights.slot_nbytes(row)) for row in weights.rows)
    if options.operations_per_group < widest:
        raise InvalidOptions(
            f"operations_per_group is {options.operations_per_group}; an expert alone is {widest} tensors",
            option="operations_per_group",
        )


__all__ = ["ExpertUpdater", "LayerCommitted", "UpdateOptions", "UpdateSummary"]
