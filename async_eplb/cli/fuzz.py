"""The command ``fuzz``: simulated worlds, seed by seed, until an invariant is violated."""

import argparse
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from async_eplb.cli.render import print_table, progress
from async_eplb.errors import InvalidOptions
from async_eplb.fuzz import Outcome, Scenario, scenario_for, shrink, simulate

_BATCH = 25
"""Seeds that a process runs before it returns their sums."""

_DESCRIPTION = """\
Run simulated worlds of 2 to 4 ranks that move 2 to 4 layers, each from a seed that decides every
interleaving and what goes wrong: messages late, lost, twice, or with another byte; ranks killed, frozen
or slow; callers that cancel; memory, worker threads and copies that fail; control rounds whose result one
rank does not get. Survivors recover. Invariants are checked after every event.

A seed that fails is made smaller, and printed with how to run it again.

Exit status: 0 if everything held, 1 if not.
"""

_EPILOG = """\
examples:
  async_eplb fuzz                        seeds 1 to 1000
  async_eplb fuzz --seeds 1:10000 -j 2   more of them, in two processes
  async_eplb fuzz --seeds 123            one seed
  async_eplb fuzz --scenario '{...}'     what a failure printed
"""


@dataclass(slots=True)
class Tally:
    """Sums over the outcomes of many seeds."""

    num_seeds: int = 0
    num_events: int = 0
    num_recovered: int = 0
    virtual_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    failing: list[Scenario] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add the sums of other seeds."""
        self.num_seeds += other.num_seeds
        self.num_events += other.num_events
        self.num_recovered += other.num_recovered
        self.virtual_s += other.virtual_s
        self.errors += other.errors
        self.failing += other.failing


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "fuzz",
        help="run simulated worlds in which things go wrong",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="1:1000", metavar="FIRST:LAST", help="seeds to run (%(default)s)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--scenario", metavar="JSON", help="run this world instead of seeds")
    parser.add_argument("--keep", action="store_true", help="do not make failing worlds smaller")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if options.scenario is not None:
        return _report(simulate(_scenario(options.scenario)))
    seeds = _seeds(options.seeds)
    if options.jobs < 1:
        raise InvalidOptions(f"--jobs is {options.jobs}; it must be at least 1", option="jobs")
    tally = Tally()
    start = time.perf_counter()
    with progress({"seeds": len(seeds)}) as advance:
        for part in _tallies(seeds, options.jobs):
            tally.add(part)
            for _ in range(part.num_seeds):
                advance("seeds")
            if tally.failing:
                break
    _print(tally, time.perf_counter() - start)
    for scenario in tally.failing[:1]:
        _explain(scenario, smaller=not options.keep)
    return 1 if tally.failing else 0


def run_seeds(seeds: Iterable[int]) -> Tally:
    """Run the worlds of seeds, and stop after the first that fails."""
    torch.set_num_threads(1)
    tally = Tally()
    for seed in seeds:
        outcome = simulate(scenario_for(seed))
        tally.num_seeds += 1
        tally.num_events += outcome.num_events
        tally.num_recovered += outcome.num_recoveries > 0
        tally.virtual_s += outcome.virtual_s
        tally.errors.update(outcome.failures)
        if outcome.violation is not None:
            tally.failing.append(outcome.scenario)
            break
    return tally


def _tallies(seeds: range, jobs: int) -> Iterator[Tally]:
    batches = [seeds[start : start + _BATCH] for start in range(0, len(seeds), _BATCH)]
    if jobs == 1:
        yield from map(run_seeds, batches)
        return
    with _processes(jobs) as pool:
        for done in as_completed([pool.submit(run_seeds, batch) for batch in batches]):
            yield done.result()


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end when the body ends, also when it is interrupted."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts_to_owner)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_owner() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    try:
        seeds = range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds or seeds.start < 0:
        raise InvalidOptions(f"--seeds is {text!r}; it must be FIRST:LAST, such as 1:10000", option="seeds")
    return seeds


def _scenario(text: str) -> Scenario:
    try:
        return Scenario.from_json(text)
    except ValueError as error:
        raise InvalidOptions(f"--scenario: {error}", option="scenario") from error


def _print(tally: Tally, duration_s: float) -> None:
    rows = [
        ("seeds", f"{tally.num_seeds}"),
        ("events", f"{tally.num_events}"),
        ("worlds that recovered", f"{tally.num_recovered}"),
        ("simulated time", f"{tally.virtual_s:.0f} s"),
        ("real time", f"{duration_s:.1f} s"),
        *((f"  {name}", f"{count}") for name, count in tally.errors.most_common()),
        ("violations", f"{len(tally.failing)}"),
    ]
    print_table("Simulated worlds, and the errors that ranks met with", rows)


def _report(outcome: Outcome) -> int:
    print(f"{outcome.num_events} events in {outcome.virtual_s:.3f} s, trace {outcome.trace}")
    for name in outcome.failures:
        print(f"a rank met with {name}")
    print("everything held" if outcome.violation is None else f"violation: {outcome.violation}")
    return 0 if outcome.violation is None else 1


def _explain(scenario: Scenario, *, smaller: bool) -> None:
    violation = simulate(scenario).violation
    print(f"seed {scenario.seed}: {violation}")
    print(f"  again: python -m async_eplb fuzz --scenario '{scenario.to_json()}'")
    if not smaller or violation is None:
        return

    def fails(candidate: Scenario) -> bool:
        found = simulate(candidate).violation
        return found is not None and found.invariant is violation.invariant

    least = shrink(scenario, fails)
    print(f"smaller: {simulate(least).violation}")
    print(f"  again: python -m async_eplb fuzz --scenario '{least.to_json()}'")
