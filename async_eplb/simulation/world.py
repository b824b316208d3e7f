"""A simulated world: ranks that update, serve, meet with trouble, and recover."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import numpy as np
from anyio import CancelScope, Event, create_task_group
from anyio.lowlevel import checkpoint

from async_eplb.errors import EplbError, UpdateCancelled
from async_eplb.events import Logger
from async_eplb.load import ExpertLoad
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.policy import Global
from async_eplb.recovery import Recovery
from async_eplb.sample_model import random_placement
from async_eplb.simulation.invariants import Checker, Invariant, Violation, Watched
from async_eplb.simulation.loop import RANK, SimulatedLoop
from async_eplb.simulation.machine import FailingCommitter, SimulatedDevice, SimulatedWorkers
from async_eplb.simulation.model import TinyModel, tensors_of
from async_eplb.simulation.scenario import Mishap, Scenario, Trouble
from async_eplb.survivors import on_survivors
from async_eplb.topology import EPTopology
from async_eplb.transport.memory import Fault, FaultKind, MemorySchedule, MemoryTransport
from async_eplb.updater import ExpertUpdater
from async_eplb.weights import ExpertWeights

_MESSAGE_FAULTS = {
    Mishap.DELAY: FaultKind.DELAY,
    Mishap.DROP: FaultKind.DROP,
    Mishap.DUPLICATE: FaultKind.DUPLICATE,
    Mishap.CORRUPT: FaultKind.CORRUPT,
}
_CONTROL_S = 0.01
"""What a control round takes at least; without it, rounds would go on for ever at one instant."""
TRANSFER_TIMEOUT_S = 2.0
CONTROL_TIMEOUT_S = 4.0
COLLECTIVE_TIMEOUT_S = 30.0
"""How long a model's collective waits for a rank."""
DEADLINE_S = 150.0
"""By which every rank has ended its updates, one way or another: several times all timeouts together."""


class PassBroken(Exception):
    """A pass cannot be finished: a rank does not take part in its collectives."""


class Collectives:
    """What ranks that serve do together in each pass."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._arrived: dict[int, set[int]] = {}
        self._complete: dict[int, Event] = {}
        self._all_done: dict[int, bool] = {}
        self._broken = False

    def break_off(self) -> None:
        """Fail all passes, those to come too."""
        self._broken = True
        for event in self._complete.values():
            event.set()

    async def meet(self, number: int, rank: int, *, done: bool) -> bool:
        """Wait for all ranks in a pass; return whether all are done.

        :raises PassBroken: if one does not come
        """
        arrived = self._arrived.setdefault(number, set())
        complete = self._complete.setdefault(number, Event())
        arrived.add(rank)
        self._all_done[number] = self._all_done.get(number, True) and done
        if len(arrived) == self._num_ranks:
            complete.set()
        if not self._broken:
            with anyio.move_on_after(COLLECTIVE_TIMEOUT_S):
                await complete.wait()
        if len(arrived) < self._num_ranks:
            self.break_off()
            raise PassBroken
        return self._all_done[number]


@dataclass(slots=True)
class Rank:
    """One rank of the world.

    :param settled: it has nothing left to do, well or ill, until it is told how to go on
    """

    watched: Watched
    updater: ExpertUpdater
    transport: MemoryTransport
    scope: CancelScope = field(default_factory=CancelScope)
    cancelling: Callable[[], None] | None = None
    native_cancel: bool = False
    failure: Exception | None = None
    settled: bool = False
    go_on: Event = field(default_factory=Event)
    next_transport: MemoryTransport | None = None
    next_placement: ExpertPlacement | None = None
    recovery: Recovery | None = None
    excluded: bool = False
    left: bool = False

    @property
    def number(self) -> int:
        """Its number."""
        return self.watched.rank


class World:
    """Ranks, and the one who sees to it that survivors recover together.

    :param trace: called with what happens, in order
    """

    def __init__(self, scenario: Scenario, loop: SimulatedLoop, logger: Callable[[int], Logger]) -> None:
        self.scenario = scenario
        self._loop = loop
        self._random = random.Random(scenario.seed ^ 0x5EED)  # noqa: S311 - repeatable
        self.topology = EPTopology(scenario.num_ranks, scenario.num_nodes, scenario.num_slots)
        self._model = TinyModel(scenario.seed, scenario.num_layers, scenario.num_experts)
        self.placements = _placements(scenario, self.topology)
        self._collectives = Collectives(scenario.num_ranks)
        self._pending = sorted(
            (t for t in scenario.troubles if t.mishap in _STRIKES), key=lambda trouble: trouble.event
        )
        self._news = Event()
        self.num_recoveries = 0
        self.failures: list[str] = []
        transports = MemoryTransport.world(scenario.num_ranks, _schedule(scenario))
        self.ranks = [self._make_rank(rank, transports[rank], logger(rank)) for rank in range(scenario.num_ranks)]
        self.checker = Checker(self._model, self.topology, [rank.watched for rank in self.ranks])
        self._news = Event()

    def _make_rank(self, number: int, transport: MemoryTransport, logger: Logger) -> Rank:
        scenario = self.scenario
        mine = tuple(trouble for trouble in scenario.troubles if trouble.rank == number)
        memory = self._model.memory(self.placements[0], self.topology, number)
        updater = ExpertUpdater(
            ExpertWeights(tensors_of(memory)),
            self.placements[0],
            self.topology,
            rank=number,
            transport=transport,
            options=UpdateOptions(
                verify=scenario.verify,
                staging_depth=scenario.staging_depth,
                operations_per_group=scenario.operations_per_group,
                lead=scenario.lead,
                transfer_timeout_s=TRANSFER_TIMEOUT_S,
                control_timeout_s=CONTROL_TIMEOUT_S,
            ),
            workers=SimulatedWorkers(random.Random(scenario.seed * 31 + number), mine),  # noqa: S311 - repeatable
            device=SimulatedDevice(mine),
            logger=logger,
        )
        live = updater._verifier.weights
        updater._committer = FailingCommitter(updater._committer, live.views, mine)
        return Rank(Watched(number, updater, memory), updater, transport)

    def after_event(self, number: int | None) -> None:
        """Check the invariants, and let happen what is due."""
        self.checker.after_event(number)
        while self._pending and self._pending[0].event <= self._loop.num_events:
            self._strike(self._pending.pop(0))

    def _strike(self, trouble: Trouble) -> None:
        rank = self.ranks[trouble.rank]
        if rank.excluded or rank.watched.gone:
            return
        if trouble.mishap is Mishap.CANCEL:
            if rank.cancelling is not None:
                rank.cancelling()
        elif trouble.mishap is Mishap.CANCEL_NATIVELY:
            rank.native_cancel = True
            if rank.cancelling is not None:
                rank.scope.cancel()
        elif trouble.mishap is Mishap.FREEZE:
            self._loop.still.add(rank.number)
            self._loop.call_later(trouble.seconds, self._thaw, rank)
        elif sum(not other.watched.gone and not other.excluded for other in self.ranks) > 1:
            rank.watched.gone = True
            self._loop.still.add(rank.number)
            (rank.next_transport or rank.transport).die()
            self._collectives.break_off()
            self._tell()

    def _thaw(self, rank: Rank) -> None:
        if not rank.watched.gone:
            self._loop.go_on(rank.number)

    def _tell(self) -> None:
        self._news.set()
        self._news = Event()

    async def run(self) -> None:
        """Run the world to its end.

        :raises Violation: if an invariant does not hold
        """
        async with create_task_group() as tasks:
            for rank in self.ranks:
                tasks.start_soon(self._live, rank)
            await self._direct()
            for rank in self.ranks:
                rank.excluded = True
                self._loop.go_on(rank.number)
                rank.go_on.set()

    async def _direct(self) -> None:
        """Let survivors recover until all is well."""
        while True:
            survivors = await self._all_settled()
            failed = [rank for rank in survivors if rank.failure is not None]
            whole = len(survivors) == self.scenario.num_ranks
            if not failed and (whole or self.num_recoveries):
                self._check_end(survivors)
                return
            if not failed and not whole and all(rank.updater._run is None for rank in survivors):
                pass  # somebody died when all was done; survivors find out by recovering
            for rank in self.ranks:
                if rank not in survivors:
                    rank.excluded = rank.watched.gone = True
            self.num_recoveries += 1
            if self.num_recoveries > len(self.scenario.troubles) + 2:
                raise Violation(Invariant.RECOVERED, f"recovered {self.num_recoveries} times in vain: {[repr(rank.failure) for rank in failed]}")
            transports = MemoryTransport.world(len(survivors), MemorySchedule(seed=self.num_recoveries, control_s=_CONTROL_S))
            placement = self._placement_for([rank.number for rank in survivors])
            for rank, transport in zip(survivors, transports, strict=True):
                rank.settled, rank.failure = False, None
                rank.next_transport, rank.next_placement = transport, placement
                rank.go_on.set()
                rank.go_on = Event()

    async def _all_settled(self) -> list[Rank]:
        """Wait until every rank that runs has settled; return those, the others being lost."""
        with anyio.move_on_after(DEADLINE_S) as limit:
            while True:
                await self._until(
                    lambda: all(rank.settled or rank.number in self._loop.still for rank in self.ranks if not rank.excluded)
                )
                frozen = [rank for rank in self.ranks if rank.number in self._loop.still and not rank.watched.gone]
                if not any(rank.failure is not None for rank in self.ranks) and [r for r in frozen if not r.settled]:
                    await anyio.sleep(1.0)
                    continue
                break
        if limit.cancelled_caught:
            late = [rank.number for rank in self.ranks if not rank.settled and rank.number not in self._loop.still]
            raise Violation(Invariant.ENDS_IN_TIME, f"ranks {late} have not ended within {DEADLINE_S} s")
        return [rank for rank in self.ranks if rank.settled and not rank.watched.gone and not rank.excluded]

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            with anyio.move_on_after(1.0):
                await self._news.wait()

    def _placement_for(self, members: Sequence[int]) -> ExpertPlacement | None:
        """Return a placement for survivors, if they have a slot for each expert."""
        physical = len(members) * self.scenario.num_slots
        if physical < self.scenario.num_experts:
            return None
        rng = np.random.default_rng([self.scenario.seed, self.num_recoveries])
        drawn = random_placement(rng, self.scenario.num_layers, physical, self.scenario.num_experts)
        return on_survivors(drawn, self.topology, members)

    def _check_end(self, survivors: Sequence[Rank]) -> None:
        placements = {rank.updater.placement for rank in survivors}
        maps = {rank.watched.map.tobytes() for rank in survivors}
        if len(placements) > 1 or len(maps) > 1:
            raise Violation(Invariant.RECOVERED, f"ranks {[rank.number for rank in survivors]} differ in the end")
        placement = placements.pop()
        for rank in survivors:
            self.checker.check_layers(rank.watched)
            if rank.watched.map.tolist() != placement.physical_to_logical_map.tolist():
                raise Violation(Invariant.RECOVERED, f"rank {rank.number} publishes another map than it says")
            if not rank.updater._pool.all_free:
                raise Violation(Invariant.ONE_STATE, f"rank {rank.number} holds {rank.updater._pool.buffers}")
            if len(survivors) * self.scenario.num_slots >= self.scenario.num_experts:
                self.checker.check_replicas(rank.watched)

    async def _live(self, rank: Rank) -> None:
        """Be one rank."""
        RANK.set(rank.number)
        try:
            async with rank.updater:
                await self._settle(rank, self._first_life)
                while not rank.excluded:
                    await self._settle(rank, self._next_life)
        except EplbError as error:
            if not rank.excluded:
                raise Violation(Invariant.TYPED_ERRORS, f"rank {rank.number} could not leave: {error!r}") from error

    async def _settle(self, rank: Rank, life: Callable[[Rank], object]) -> None:
        go_on = rank.go_on
        try:
            await life(rank)  # type: ignore[misc]
        except (EplbError, PassBroken, OSError, MemoryError) as error:
            rank.failure = error
        if rank.failure is not None:
            self.failures.append(type(rank.failure).__name__)
            self._collectives.break_off()
        rank.settled = True
        self._tell()
        await go_on.wait()

    async def _first_life(self, rank: Rank) -> None:
        if self.scenario.serving:
            await self._serve(rank)
        else:
            for placement in self.placements[1:]:
                await self._update_alone(rank, placement)

    async def _update_alone(self, rank: Rank, placement: ExpertPlacement) -> None:
        with CancelScope() as rank.scope:
            rank.cancelling = rank.scope.cancel
            try:
                await rank.updater.update(placement)
            except UpdateCancelled:
                return
            finally:
                rank.cancelling = None

    async def _next_life(self, rank: Rank) -> None:
        """Recover, and update and serve once more."""
        if rank.next_transport is None:
            return
        rank.watched.recovering = True
        rank.watched.serving = False
        rank.recovery = await rank.updater.recover(rank.next_transport, source=self._model)
        rank.watched.recovering = False
        if rank.next_placement is not None:
            await rank.updater.update(rank.next_placement)

    async def _serve(self, rank: Rank) -> None:
        """Make passes until all ranks have done all updates."""
        done = Event()
        async with create_task_group() as tasks:
            tasks.start_soon(self._update_beside, rank, done)
            try:
                await self._make_passes(rank, done)
            except (PassBroken, EplbError) as error:
                rank.failure = rank.failure or error
                self._collectives.break_off()
                tasks.cancel_scope.cancel()  # nobody waits for an update that no step follows
            rank.watched.serving = False

    async def _update_beside(self, rank: Rank, done: Event) -> None:
        try:
            for placement in self.placements[1:]:
                await anyio.sleep(self._random.uniform(0, 0.1))
                handle = rank.updater.begin(placement)
                rank.cancelling = handle.cancel
                try:
                    await handle.wait()
                except UpdateCancelled:
                    pass
                finally:
                    rank.cancelling = None
        except (EplbError, OSError, MemoryError) as error:
            rank.failure = rank.failure or error
        finally:
            done.set()

    async def _make_passes(self, rank: Rank, done: Event) -> None:
        number = 0
        every = self.scenario.idle_every
        while True:
            number += 1
            rank.watched.serving = False
            if every and number % every == 0:
                async with rank.updater.idle():
                    await anyio.sleep(self._random.uniform(0, 0.2))
                await self._collectives.meet(-number, rank.number, done=False)
            await rank.updater.step(number if self.scenario.numbered else None)
            self.checker.passes(rank.watched, number)
            rank.watched.serving = True
            await anyio.sleep(self._random.choice((0.001, 0.002, 0.01, 0.03)))
            if await self._collectives.meet(number, rank.number, done=done.is_set()):
                return
            await checkpoint()


_STRIKES = frozenset({Mishap.KILL, Mishap.FREEZE, Mishap.CANCEL, Mishap.CANCEL_NATIVELY})


def _placements(scenario: Scenario, topology: EPTopology) -> list[ExpertPlacement]:
    rng = np.random.default_rng(scenario.seed)
    shape = (scenario.num_layers, topology.num_physical_experts, scenario.num_experts)
    placements = [random_placement(rng, *shape)]
    for _ in range(scenario.num_updates):
        if scenario.by_policy:
            load = ExpertLoad.from_counts(rng.integers(0, 100, (scenario.num_layers, scenario.num_experts)))
            placements.append(Global()(load, placements[-1], topology))
        else:
            placements.append(random_placement(rng, *shape))
    return placements


def _schedule(scenario: Scenario) -> MemorySchedule:
    troubles = scenario.troubles
    return MemorySchedule(
        seed=scenario.seed,
        message_jitter_s=0.01,
        control_s=_CONTROL_S,
        control_jitter_s=0.02,
        reorder=scenario.reorder,
        launch_rule=scenario.launch_rule,
        lost_results=frozenset((t.rank, t.count) for t in troubles if t.mishap is Mishap.LOSE_ROUND),
        faults=tuple(
            Fault(_MESSAGE_FAULTS[t.mishap], t.peer, t.rank, t.layer, delay_s=_delay_s(t))
            for t in troubles
            if t.mishap in _MESSAGE_FAULTS
        ),
    )


def _delay_s(trouble: Trouble) -> float:
    return trouble.seconds if trouble.mishap in {Mishap.DELAY, Mishap.DUPLICATE} else 0.0
