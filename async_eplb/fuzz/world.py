"""A simulated world: its ranks, the troubles that strike them, and a director that lets survivors recover together."""

import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio
import numpy as np
from anyio import Event, create_task_group

from async_eplb.events.emit import Logger
from async_eplb.fuzz.invariants import Checker, Invariant, Violation, Watched
from async_eplb.fuzz.life import Collectives, Life, SimulatedRank
from async_eplb.fuzz.loop import RANK, SimulatedLoop
from async_eplb.fuzz.machine import SimulatedDevice, SimulatedUpdater, SimulatedWorkers
from async_eplb.fuzz.model import TinyModel, tensors_of
from async_eplb.fuzz.scenario import Mishap, Scenario, Trouble
from async_eplb.load.value import ExpertLoad
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.plan import Planner
from async_eplb.policy import Global
from async_eplb.recovery.survivors import on_survivors
from async_eplb.staging import BufferState
from async_eplb.testing.sample_model import random_placement
from async_eplb.topology import EPTopology
from async_eplb.transport.memory.schedule import Fault, FaultKind, MemorySchedule
from async_eplb.transport.memory.transport import MemoryTransport
from async_eplb.weights import ExpertWeights

_MESSAGE_FAULTS = {
    Mishap.DELAY: FaultKind.DELAY,
    Mishap.DROP: FaultKind.DROP,
    Mishap.DUPLICATE: FaultKind.DUPLICATE,
    Mishap.CORRUPT: FaultKind.CORRUPT,
}
_CONTROL_S = 0.01
"""The least time of a control round; without it, rounds would go on for ever at one instant."""
TRANSFER_TIMEOUT_S = 2.0
CONTROL_TIMEOUT_S = 4.0
PROGRESS_TIMEOUT_S = 40.0
PAUSED_PROGRESS_TIMEOUT_S = 5.0
"""Where traffic pauses for longer."""
DEADLINE_S = 200.0
"""By which every rank has ended its updates, one way or another: several times all timeouts together."""
_MAX_RECOVERIES = 8
_MAX_INTERRUPTED = 2
"""Recoveries in which rounds may be lost."""


class SimulatedWorld:
    """The ranks of a scenario, and the director that lets survivors recover together.

    :param loop: the event loop that it runs in
    :param logger: rank → where it logs
    """

    def __init__(self, scenario: Scenario, loop: SimulatedLoop, logger: Callable[[int], Logger]) -> None:
        self._scenario = scenario
        self._loop = loop
        self._topology = EPTopology(scenario.num_ranks, scenario.num_nodes, scenario.num_slots)
        self._model = TinyModel(scenario.seed, scenario.num_layers, scenario.num_experts)
        self._old, *self._targets = _placements(scenario, self._topology)
        self._collectives = Collectives(scenario.num_ranks)
        self._to_strike = sorted((t for t in scenario.troubles if t.mishap in _STRIKES), key=lambda t: t.event)
        self._news = Event()
        self.num_recoveries = 0
        self.failures: list[str] = []
        transports = MemoryTransport.world(scenario.num_ranks, _schedule(scenario))
        self.ranks = [self._make_rank(number, transport, logger(number)) for number, transport in enumerate(transports)]
        self.checker = Checker(self._model, self._topology, [rank.watched for rank in self.ranks])

    def _make_rank(self, number: int, transport: MemoryTransport, logger: Logger) -> SimulatedRank:
        scenario = self._scenario
        troubles = tuple(trouble for trouble in scenario.troubles if trouble.rank == number)
        memory = self._model.memory(self._old, self._topology, number)
        updater = SimulatedUpdater(
            ExpertWeights(tensors_of(memory)),
            self._old,
            self._topology,
            troubles,
            rank=number,
            transport=transport,
            options=UpdateOptions(
                verify=scenario.tuning.verify,
                planner=Planner(scenario.tuning.sources),
                staging_depth=scenario.tuning.staging_depth,
                operations_per_group=scenario.tuning.operations_per_group,
                lead=scenario.tuning.lead,
                transfer_timeout_s=TRANSFER_TIMEOUT_S,
                control_timeout_s=CONTROL_TIMEOUT_S,
                progress_timeout_s=PAUSED_PROGRESS_TIMEOUT_S if scenario.traffic.pause_after else PROGRESS_TIMEOUT_S,
            ),
            workers=SimulatedWorkers(random.Random(scenario.seed * 31 + number), troubles),  # noqa: S311 - repeatable
            device=SimulatedDevice(troubles),
            logger=logger,
        )
        return SimulatedRank(Watched(number, updater, memory), updater, transport)

    async def run(self) -> None:
        """Run the world to its end.

        :raises Violation: if an invariant does not hold
        """
        async with create_task_group() as tasks:
            for rank in self.ranks:
                life = Life(
                    self._scenario,
                    rank,
                    self._targets,
                    checker=self.checker,
                    collectives=self._collectives,
                    source=self._model,
                    notify=self._notify,
                )
                tasks.start_soon(self._or_break, partial(_as_rank, rank.number, life))
            await self._or_break(self._direct)
            for rank in self.ranks:
                rank.excluded = True
                self._loop.thaw(rank.number)
                rank.resumed.set()

    async def _or_break(self, function: Callable[[], Awaitable[None]]) -> None:
        try:
            await function()
        except Exception as error:
            self._loop.broken_by = error
            raise

    def after_event(self, number: int | None) -> None:
        """Check the invariants, then let the troubles that are due strike."""
        self.checker.after_event(number)
        while self._to_strike and self._to_strike[0].event <= self._loop.num_events:
            self._strike(self._to_strike.pop(0))

    def _strike(self, trouble: Trouble) -> None:
        rank = self.ranks[trouble.rank]
        if rank.excluded or rank.watched.gone:
            return
        if trouble.mishap is Mishap.CANCEL and rank.cancel is not None:
            rank.cancel()
        elif trouble.mishap is Mishap.CANCEL_NATIVELY and rank.cancel_natively is not None:
            rank.cancel_natively()
        elif trouble.mishap is Mishap.FREEZE:
            self._loop.frozen.add(rank.number)
            self._loop.call_later(trouble.seconds, self._thaw, rank)
        elif trouble.mishap is Mishap.LEAVE and self._is_one_of_many():
            rank.life.cancel()
        elif trouble.mishap is Mishap.KILL and self._is_one_of_many():
            rank.watched.gone = True
            self._loop.frozen.add(rank.number)
            rank.transport.die()
            self._collectives.fail_all()
            self._notify()

    def _is_one_of_many(self) -> bool:
        return sum(not rank.watched.gone and not rank.life.cancel_called for rank in self.ranks) > 1

    def _thaw(self, rank: SimulatedRank) -> None:
        if not rank.watched.gone:
            self._loop.thaw(rank.number)

    def _notify(self) -> None:
        self._news.set()
        self._news = Event()

    async def _direct(self) -> None:
        """Let the ranks that remain recover together, until none has failed and none is lost."""
        while True:
            survivors = await self._settled()
            if not survivors:
                return  # the last ones were lost at the same time
            failures = [repr(rank.failure) for rank in survivors if rank.failure is not None]
            num_failed = len(failures) + sum(rank.num_failures for rank in survivors)
            if num_failed and not self._scenario.troubles:
                raise Violation(Invariant.UNDISTURBED, f"{num_failed} updates failed: {failures}")
            self.failures += [type(rank.failure).__name__ for rank in survivors if rank.failure is not None]
            lost = [rank for rank in self.ranks if rank not in survivors and not rank.excluded]
            if not failures and not lost:
                self._check_end(survivors)
                return
            for rank in lost:
                rank.excluded = rank.watched.gone = True
            self.num_recoveries += 1
            if self.num_recoveries > _MAX_RECOVERIES:
                raise Violation(Invariant.RECOVERED, f"recovered {self.num_recoveries} times in vain: {failures}")
            schedule = self._recovery_schedule([rank.number for rank in survivors])
            placement = self._placement_for([rank.number for rank in survivors])
            for rank, transport in zip(survivors, MemoryTransport.world(len(survivors), schedule), strict=True):
                rank.resume(transport, placement)

    def _recovery_schedule(self, members: Sequence[int]) -> MemorySchedule:
        """Return the schedule of a recovery and the update after it; in the first recoveries, rounds are lost too."""
        lost = _lost_rounds(self._scenario) if self.num_recoveries <= _MAX_INTERRUPTED else frozenset()
        places = {number: place for place, number in enumerate(members)}
        return MemorySchedule(
            seed=self.num_recoveries,
            control_s=_CONTROL_S,
            launch_rule=self._scenario.launch_rule,
            lost_results=frozenset((places[number], count) for number, count in lost if number in places),
        )

    async def _settled(self) -> list[SimulatedRank]:
        """Wait until every running rank has settled; return those that are not lost.

        :raises Violation: if one has not settled by the deadline
        """
        with anyio.move_on_after(DEADLINE_S):
            while not self._have_settled():
                with anyio.move_on_after(1.0):
                    await self._news.wait()
        late = [rank.number for rank in self.ranks if not (rank.settled or rank.excluded or self._is_frozen(rank))]
        if late:
            raise Violation(Invariant.ENDS_IN_TIME, f"ranks {late} have not ended within {DEADLINE_S} s")
        return [rank for rank in self.ranks if rank.settled and not (rank.watched.gone or rank.excluded)]

    def _have_settled(self) -> bool:
        """Whether all ranks have settled. A frozen one counts if it is gone, or another rank has failed meanwhile."""
        live = [rank for rank in self.ranks if not rank.excluded]
        missed = any(rank.failure is not None for rank in live)
        return all(rank.settled or (self._is_frozen(rank) and (missed or rank.watched.gone)) for rank in live)

    def _is_frozen(self, rank: SimulatedRank) -> bool:
        return rank.number in self._loop.frozen

    def _placement_for(self, members: Sequence[int]) -> ExpertPlacement | None:
        """Return a placement on the ranks that remain, or None if they have fewer slots than experts."""
        physical = len(members) * self._scenario.num_slots
        if physical < self._scenario.num_experts:
            return None
        rng = np.random.default_rng([self._scenario.seed, self.num_recoveries])
        drawn = random_placement(rng, self._scenario.num_layers, physical, self._scenario.num_experts)
        return on_survivors(drawn, self._topology, members)

    def _check_end(self, survivors: Sequence[SimulatedRank]) -> None:
        """Check that the ranks that remain have the same placement, publish it, and have all staging free.

        :raises Violation: if not
        """
        placements = {rank.updater.placement for rank in survivors}
        if len(placements) > 1:
            raise Violation(Invariant.RECOVERED, f"ranks {[rank.number for rank in survivors]} differ in the end")
        placement = placements.pop()
        enough = len(survivors) * self._scenario.num_slots >= self._scenario.num_experts
        for rank in survivors:
            self.checker.check_layers(rank.watched)
            if rank.watched.map.tolist() != placement.physical_to_logical_map.tolist():
                raise Violation(Invariant.RECOVERED, f"rank {rank.number} publishes another map than its placement")
            if any(buffer.state is not BufferState.FREE for buffer in rank.updater.staging):
                raise Violation(Invariant.ONE_STATE, f"rank {rank.number} has staging in use: {rank.updater.staging}")
            if enough:
                self.checker.check_replicas(rank.watched)


_STRIKES = frozenset({Mishap.KILL, Mishap.FREEZE, Mishap.LEAVE, Mishap.CANCEL, Mishap.CANCEL_NATIVELY})


async def _as_rank(number: int, life: Life) -> None:
    RANK.set(number)
    await life.live()


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
        lost_results=_lost_rounds(scenario),
        faults=tuple(
            Fault(_MESSAGE_FAULTS[t.mishap], t.peer, t.rank, t.layer, delay_s=_delay_s(t))
            for t in troubles
            if t.mishap in _MESSAGE_FAULTS
        ),
    )


def _lost_rounds(scenario: Scenario) -> frozenset[tuple[int, int]]:
    """Return (rank, number of a control round whose result it does not get)."""
    return frozenset((t.rank, t.count) for t in scenario.troubles if t.mishap is Mishap.LOSE_ROUND)


def _delay_s(trouble: Trouble) -> float:
    return trouble.seconds if trouble.mishap in {Mishap.DELAY, Mishap.DUPLICATE} else 0.0
