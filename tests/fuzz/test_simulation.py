"""Simulated worlds: each seed is one exact run, the invariants hold in all, and each catches what breaks it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from async_eplb.agreement.outlook import PeerFaults
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.commit.committer import CopyCommit
from async_eplb.fuzz import Invariant, Mishap, Scenario, Traffic, Trouble, Tuning, scenario_for, simulate
from async_eplb.staging import BufferState, StagingPool
from async_eplb.transport import Exchange
from async_eplb.update.exchange import exchanges
from async_eplb.update.state import RankState

FOUND = {
    "staging had no buffers after an allocation failed": Scenario(
        35, num_experts=4, troubles=(Trouble(Mishap.FAIL_ALLOCATION, 1),)
    ),
    "a worker that failed while ranks stood still ended the task that listens to the rounds": Scenario(
        87,
        num_slots=3,
        serving=True,
        traffic=Traffic(idle_every=3),
        tuning=Tuning(staging_depth=3, verify="off"),
        troubles=(Trouble(Mishap.FAIL_WORK, 1, work="commit"),),
    ),
    "an update whose last commit finished after a rank was lost never ended": Scenario(
        1000088,
        num_layers=4,
        serving=True,
        tuning=Tuning(staging_depth=3, lead=4),
        troubles=(Trouble(Mishap.KILL, 0, event=708),),
    ),
    "a step that waited when its update had failed was not told of the round that let it go on": Scenario(
        12837,
        num_experts=2,
        num_updates=2,
        serving=True,
        traffic=Traffic(idle_every=3),
        launch_rule=LaunchRule.ORDERED,
        troubles=(
            Trouble(Mishap.FREEZE, 1, event=20, count=13, work="finish", seconds=1.5),
            Trouble(Mishap.CORRUPT, 0, event=683, peer=1, count=21, work="commit", seconds=20.0),
        ),
    ),
}


def seeds_that_failed() -> list[int]:
    """Read the list beside this file."""
    lines = Path(__file__).with_name("seeds.txt").read_text().splitlines()
    return [int(line) for line in lines if not line.startswith("#")]


def trace_in_a_process(seed: int, hash_seed: int) -> str:
    """Return a seed's trace from a process of its own, whose sets of strings have another order."""
    code = f"from async_eplb.fuzz import *; print(simulate(scenario_for({seed})).trace)"
    environment = {"PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_seed_is_one_exact_run() -> None:
    """Every choice and every log event is the same, in this process and in others."""
    seeds = [*range(1, 12)]
    first = [simulate(scenario_for(seed)).trace for seed in seeds]
    assert [simulate(scenario_for(seed)).trace for seed in seeds] == first
    assert len(set(first)) == len(first)
    assert [trace_in_a_process(seeds[0], number) for number in (1, 2)] == [first[0]] * 2


def test_invariants_hold() -> None:
    """Under random faults in random order; CI runs thousands of other seeds."""
    outcomes = [simulate(scenario_for(seed)) for seed in range(1, 101)]
    assert [(o.scenario.seed, str(o.violation)) for o in outcomes if o.violation] == []
    assert sum(outcome.num_recoveries > 0 for outcome in outcomes) > 10


@pytest.mark.parametrize("seed", seeds_that_failed())
def test_seeds_that_failed_hold(seed: int) -> None:
    """Today's worlds of seeds that once broke an invariant."""
    assert simulate(scenario_for(seed)).violation is None


def test_all_mishaps_are_drawn() -> None:
    """Seeds use 2 to 4 ranks and layers, relays, and everything that can go wrong."""
    scenarios = [scenario_for(seed) for seed in range(300)]
    assert {trouble.mishap for scenario in scenarios for trouble in scenario.troubles} == set(Mishap)
    assert (
        {scenario.num_ranks for scenario in scenarios} == {scenario.num_layers for scenario in scenarios} == {2, 3, 4}
    )
    assert {scenario.tuning.sources for scenario in scenarios} == {"chunked", "relayed"}


@pytest.mark.parametrize("scenario", FOUND.values(), ids=FOUND)
def test_what_was_found_stays_mended(scenario: Scenario) -> None:
    """Worlds that broke earlier versions."""
    assert simulate(scenario).violation is None


def everywhere_is_here(agreement: Agreement) -> tuple[int, int]:
    """Take this rank's own counts for everybody's."""
    launchable = min(agreement.update.limit, agreement.update.launchable)
    return max(min(agreement.update.limit, agreement.update.staged), agreement.update.agreed), max(
        launchable, agreement.update.launched
    )


async def any_buffer(pool: StagingPool) -> Any:
    """Hand out the first buffer, in use or not."""
    pool.buffers[0].state = BufferState.FILLING
    return pool.buffers[0]


async def nobody_rolls_forward(_rank: object, state: RankState, *_: object) -> tuple[int, ...]:
    """Leave the layer in doubt as it is, and give staging back."""
    run = state.failed_run
    if run is not None:
        for layer in run.kept:
            run.pool.release(layer.buffer)
        run.kept = ()
    return ()


def without_the_last_copy(commit: CopyCommit) -> int:
    """Commit a layer but for one tensor."""
    return _RUN(replace(commit, copies=commit.copies[:-1]))


def deaf_when_lost(shared: SharedAgreement, error: Any) -> None:
    """Keep it to oneself that a rank does not answer."""
    shared.faults = PeerFaults(lost=error)


async def failing_untyped(*_: object) -> None:
    """Fail as a program with a mistake does."""
    raise ZeroDivisionError


def only_what_is_pulled(*layer: Any, **rules: Any) -> tuple[Exchange, ...]:
    """Take part in no turns of a layer of which one needs nothing from others."""
    hops = exchanges(*layer, **rules)
    return tuple(replace(hop, pulls=hop.pulls if hop.pulls and hop.pulls.slots else None) for hop in hops)


_RUN = CopyCommit.run
MUTATIONS: dict[str, tuple[Invariant, str, Any]] = {
    "a commit forgets a tensor": (
        Invariant.WHOLE_LAYERS,
        "async_eplb.commit.committer.CopyCommit.run",
        without_the_last_copy,
    ),
    "a fence holds nobody": (
        Invariant.SAME_MAPS,
        "async_eplb.agreement.boundaries.Boundaries.may_pass",
        lambda _self, _number=0: True,
    ),
    "lost experts find no home": (Invariant.LIVE_REPLICAS, "async_eplb.recovery.recover.homes", lambda *_: ()),
    "a buffer is handed out twice": (Invariant.ONE_STATE, "async_eplb.staging.StagingPool.acquire", any_buffer),
    "committed before staged everywhere": (
        Invariant.STAGED_EVERYWHERE,
        "async_eplb.agreement.protocol.Agreement._everywhere",
        everywhere_is_here,
    ),
    "a lost rank goes unnoticed": (
        Invariant.ENDS_IN_TIME,
        "async_eplb.agreement.shared.SharedAgreement.lose",
        deaf_when_lost,
    ),
    "time passes while nobody steps": (
        Invariant.UNDISTURBED,
        "async_eplb.update.watchdog.Watchdog._now",
        lambda _self, _what: anyio.current_time(),
    ),
    "an error of no type": (Invariant.TYPED_ERRORS, "async_eplb.recovery.recover.roll_forward", failing_untyped),
    "who pulls nothing passes no turn on": (
        Invariant.UNDISTURBED,
        "async_eplb.update.stages.exchanges",
        only_what_is_pulled,
    ),
    "the layer in doubt stays": (
        Invariant.RECOVERED,
        "async_eplb.recovery.recover.roll_forward",
        nobody_rolls_forward,
    ),
}


def test_each_invariant_has_a_mutation() -> None:
    """None is left untried."""
    assert {invariant for invariant, _, _ in MUTATIONS.values()} == set(Invariant)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken code breaks the invariant that it should, within a few seeds."""
    invariant, target, broken = MUTATIONS[mutation]
    monkeypatch.setattr(target, broken)
    found = (simulate(scenario_for(seed)).violation for seed in range(1, 300))
    assert any(violation.invariant is invariant for violation in found if violation is not None)
