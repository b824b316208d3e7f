"""The façade for the background task: load → policy → placement → update, again and again, while the model serves."""

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from anyio import TASK_STATUS_IGNORED, Event, to_process
from anyio.abc import TaskStatus

from async_eplb.agreement.checks import differing_ranks
from async_eplb.arguments import OneOf, OrNone, Whole, settle
from async_eplb.errors import (
    BusyUpdater,
    ClosedRebalancer,
    InvalidOptions,
    PlacementDisagreement,
    RebalanceFailed,
)
from async_eplb.events.emit import Logger, emit, guarded
from async_eplb.events.schema import RebalanceFinished
from async_eplb.events.stopwatch import Stopwatch
from async_eplb.load.source import LoadGroup, LoadSource
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy import PlacementPolicy, RebalanceDecision, RebalanceTerms, choose, require_policy_output
from async_eplb.topology import EPTopology
from async_eplb.update.summary import UpdateSummary
from async_eplb.updater import ExpertUpdater
from async_eplb.workers import ThreadWorkers, Work, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceOptions:
    """When a rebalance begins and how it runs. Equal on all ranks.

    :param every_steps: steps from the end of a rebalance to the next one; None for only on demand
    :param cool_down_steps: steps from the end of a rebalance for which demands wait
    :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each step at most; None for no limit
    :param phase: of the load that is asked for; None for all phases together
    :param run_policy_in: where the policy runs: a ``"thread"``, or a ``"process"`` of its own that cannot hold up
        the serving thread's Python; the policy is then pickled
    :raises InvalidOptions: if an option is of another type or out of its range
    """

    every_steps: int | None = 1000
    cool_down_steps: int = 0
    max_nbytes_per_step: int | None = None
    phase: str | None = None
    run_policy_in: Literal["thread", "process"] = "thread"

    def __post_init__(self) -> None:
        settle(
            self,
            InvalidOptions,
            every_steps=OrNone(Whole(1)),
            cool_down_steps=Whole(0),
            max_nbytes_per_step=OrNone(Whole(1)),
            run_policy_in=OneOf(("thread", "process")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """One rebalance, seen from one rank.

    :param number: counted from 1, the same on every rank
    :param load: that it was decided by
    :param decision: what was chosen and why
    :param summary: of the update; None if the decision was to stay
    """

    number: int
    load: ExpertLoad
    decision: RebalanceDecision
    summary: UpdateSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancerStatistics:
    """What a rebalancer has done so far.

    :param running: whether :meth:`Rebalancer.run` is active
    :param num_rebalances: loads looked at
    :param num_moved: of these, how often weights were moved
    :param received_nbytes: that all ranks together received for it
    :param balancedness: mean over layers, as the last rebalance left it; NaN before the first
    :param num_events_lost: events that the logger, or one of its observers, raised at
    :param failure: what ended :meth:`Rebalancer.run`; empty if it was cancelled, or runs
    """

    running: bool
    num_rebalances: int
    num_moved: int
    received_nbytes: int
    balancedness: float
    num_events_lost: int
    failure: str


class Rebalancer:
    """Rebalances in the background: started in the caller's task group by ``await tg.start(rebalancer.run)``.

    All ranks run one with equal arguments. A rebalance begins on all of them when it is due on one, or demanded by
    one. Each computes the placement itself, from the same load; that they agree is checked before a byte moves.

    :param updater: moves the weights; it is entered already
    :param source: counts tokens, such as a :class:`async_eplb.LoadWindow`. What it has counted is copied inside
        ``step()``, on the stream that the model works on
    :param policy: chooses placements; pure
    :param group: sums loads over the ranks
    :param terms: what a rebalance must bring to be made
    :raises InvalidOptions: if the policy runs in a process and cannot be sent there
    """

    def __init__(
        self,
        updater: ExpertUpdater,
        source: LoadSource,
        policy: PlacementPolicy,
        *,
        group: LoadGroup,
        terms: RebalanceTerms,
        options: RebalanceOptions | None = None,
        logger: Logger | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.options = options or RebalanceOptions()
        if self.options.run_policy_in == "process":
            _require_picklable(policy)
        self._updater = updater
        self._source = source
        self._policy = policy
        self._group = group
        self._terms = terms
        self._logger = guarded(logger, run_id=updater.run_id, updater=updater.name)
        self._workers = workers or ThreadWorkers()
        self._running = False
        self._failure: Exception | None = None
        self._done: dict[int, tuple[Event, list[Rebalance | Exception]]] = {}
        self._number = 0
        self._num_moved = 0
        self._received_nbytes = 0
        self._balancedness = math.nan

    def __repr__(self) -> str:
        return f"<Rebalancer of {self._updater!r}, {self._policy!r}, {self._number} rebalances>"

    def statistics(self) -> RebalancerStatistics:
        """Return what has been done so far."""
        return RebalancerStatistics(
            running=self._running,
            num_rebalances=self._number,
            num_moved=self._num_moved,
            received_nbytes=self._received_nbytes,
            balancedness=self._balancedness,
            num_events_lost=self._logger.num_lost,
            failure="" if self._failure is None else repr(self._failure),
        )

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Rebalance until cancelled. What goes wrong is raised here, to the owner of the task group.

        :raises BusyUpdater: if it runs already
        :raises WrongEventLoop: in another event loop than the updater's
        :raises EplbError: what ended a rebalance early
        """
        self._updater.home.require(self)
        if self._running:
            raise BusyUpdater(f"{self!r} runs already")
        self._running, self._failure = True, None
        task_status.started()
        try:
            while True:
                await self._until_due()
                self._number += 1
                with self._telling_waiters(self._number) as outcome:
                    outcome.append(await self._rebalance(self._number))
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._running = False
            for event, outcome in self._done.values():
                outcome.append(self._closed())
                event.set()
            self._done.clear()

    async def rebalance_now(self) -> Rebalance:
        """Demand a rebalance on all ranks, and return what it did here.

        The load is looked at after this is called. Several demands at once share one rebalance.

        :raises ClosedRebalancer: if :meth:`run` is not active, or ends before
        :raises RebalanceFailed: if it fails; :meth:`run` raises the cause
        :raises WrongEventLoop: in another event loop than the updater's
        """
        self._updater.home.require(self)
        if not self._running:
            raise self._closed() from self._failure
        number = self._number + 1
        event, outcome = self._done.setdefault(number, (Event(), []))
        self._updater.demands.demand(number)
        await event.wait()
        result = outcome[0]
        if isinstance(result, ClosedRebalancer):
            raise result
        if isinstance(result, Exception):
            raise RebalanceFailed(f"rebalance {number} failed: {result}", number=number) from result
        return result

    async def _until_due(self) -> None:
        """Wait until the next rebalance is due on this rank or demanded by any, and the last one has cooled down."""
        begun = self._updater.statistics().step
        every = self.options.every_steps
        due_step = None if every is None else begun + every
        await self._updater.demands.until_demanded(self._number + 1, due_step=due_step)
        if self._number:
            await self._updater.demands.until_step(begun + self.options.cool_down_steps)

    @contextmanager
    def _telling_waiters(self, number: int) -> Iterator[list[Rebalance | Exception]]:
        event, outcome = self._done.pop(number, (Event(), []))
        try:
            yield outcome
        except Exception as error:
            outcome.append(error)
            raise
        finally:
            if not outcome:
                outcome.append(self._closed())
            event.set()

    def _closed(self) -> ClosedRebalancer:
        why = "was cancelled, or not started" if self._failure is None else f"ended with {self._failure!r}"
        return ClosedRebalancer(f"{self!r} does not run: it {why}")

    async def _rebalance(self, number: int) -> Rebalance:
        watch = Stopwatch()
        updater = self._updater
        current = updater.placement
        snapshot = await updater.calls.at_boundary(partial(self._source.snapshot, self.options.phase))
        load = await snapshot.summed(self._group)
        decide = partial(_decide, load, current, updater.topology, self._policy, self._terms)
        decision = await self._run_policy(decide)
        await self._require_same_choice(decision.placement)
        emit(
            self._logger,
            decision.event(
                generation=updater.statistics().generation,
                rank=updater.rank,
                step=updater.statistics().step,
                policy=self._policy,
            ),
        )
        summary = None
        if decision.pays:
            await updater.demands.until_unpaused()
            handle = updater.begin(decision.placement, max_nbytes_per_step=self.options.max_nbytes_per_step)
            summary = await handle.wait()
            self._num_moved += 1
            self._received_nbytes += decision.received_nbytes
        before, after = (
            sum(values) / len(values) for values in (decision.balancedness_before, decision.balancedness_after)
        )
        self._balancedness = after if decision.pays else before
        finished = RebalanceFinished(
            generation=updater.statistics().generation,
            rank=updater.rank,
            step=updater.statistics().step,
            number=number,
            duration_ms=watch.ms(),
            moved=decision.pays,
            num_layers=len(summary.layers) if summary else 0,
            balancedness_before=before,
            balancedness_after=self._balancedness,
        )
        emit(self._logger, finished)
        return Rebalance(number=number, load=load, decision=decision, summary=summary)

    async def _run_policy(self, decide: Callable[[], RebalanceDecision]) -> RebalanceDecision:
        if self.options.run_policy_in == "process":
            return await to_process.run_sync(decide, cancellable=True)
        return await self._workers.run(Work.POLICY, decide)

    async def _require_same_choice(self, placement: ExpertPlacement) -> None:
        """Compare the placements that all ranks chose; a policy that is not deterministic is found out here."""
        own = int.from_bytes(placement.digest()[:8]) >> 1
        mine = torch.zeros(self._updater.topology.num_ranks, dtype=torch.int64, device="cpu")
        mine[self._updater.rank] = own
        digests = tuple((await self._group.sum(mine)).tolist())
        ranks = differing_ranks(digests)
        if ranks:
            raise PlacementDisagreement(
                f"ranks {list(ranks)} chose another placement than the others from the same load: {self._policy!r} "
                "must be deterministic and equal on all ranks; nothing was moved",
                digests=digests,
                ranks=ranks,
            )


def _require_picklable(policy: PlacementPolicy) -> None:
    try:
        pickle.loads(pickle.dumps(policy))  # noqa: S301 - of this process
    except Exception as error:
        raise InvalidOptions(
            f"run_policy_in is 'process', and {policy!r} cannot be sent to one ({error}): lambdas, functions inside of "
            "functions and open files cannot; functions and classes of a module can",
            option="run_policy_in",
        ) from error


def _decide(
    load: ExpertLoad,
    current: ExpertPlacement,
    topology: EPTopology,
    policy: PlacementPolicy,
    terms: RebalanceTerms,
) -> RebalanceDecision:
    """Run a policy and weigh what it chose; at module level, so that a process can be told to."""
    candidate = policy(load, current, topology)
    require_policy_output(policy, candidate, current, topology)
    return choose(load, current, candidate, topology, terms)
