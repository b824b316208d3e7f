"""``scripts/demo --serve``: a server under skewed, then shifting load, rebalanced while it answers."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import anyio
import httpx

from async_eplb.cli.render import print_table
from serving.client import LoadResult, Prompt, TokenSample, prompts_about, run_load
from serving.config import ModelConfig, PolicyName, RebalancingConfig, ServingConfig
from serving.launcher import running_server
from serving.rank import percentiles

_CONFIG = ServingConfig(slots_per_expert=1.25, dispatch="round_robin", model=ModelConfig(num_logical_experts=32))
_TOPICS = {"skewed": (0, 1), "shifted": (5, 4)}
"""What the prompts of each phase are about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What came of one run.

    :param phases: name → result, in order
    :param rebalances: what the server said that each did
    :param statistics: of rank 0, at the end
    """

    phases: dict[str, LoadResult]
    rebalances: list[dict[str, Any]]
    statistics: dict[str, Any]

    @property
    def updates(self) -> list[tuple[float, float]]:
        """Begin and end of each update."""
        return [(update["begun_s"], update["ended_s"]) for update in self.statistics["updates"]]

    @property
    def answers(self) -> dict[int, list[int]]:
        """All answers, by the prompt's number."""
        return {number: answer for phase in self.phases.values() for number, answer in phase.answers.items()}


@dataclass(frozen=True, slots=True)
class Interval:
    """Part of a run, on the monotonic clock: the times of one phase, relative to its updates."""

    name: str
    begin_s: float
    end_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 only if every token is what it is without rebalancing."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo --serve",
        description="Start a server of several processes, send it prompts about few topics, then about others, and "
        "rebalance its experts in the middle of each, while it answers. The same prompts are first answered without "
        "rebalancing; exit status 0 only if every token is the same.",
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--requests", type=int, default=64, help="of each phase (default: 64)")
    parser.add_argument("--tokens", type=int, default=24, help="that each answer has (default: 24)")
    parser.add_argument("--concurrency", type=int, default=24, help="requests at once (default: 24)")
    parser.add_argument(
        "--policy", choices=get_args(PolicyName), default="incremental", help="where experts go (default: incremental)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write each rank's events there, as JSON lines")
    options = parser.parse_args(arguments)
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    reference, run = anyio.run(_both, options)
    wrong = [number for number, answer in reference.answers.items() if run.answers.get(number) != answer]
    print_table(_title(options), list(_rows(reference, run)))
    if wrong:
        print(f"WRONG: {len(wrong)} of {len(reference.answers)} answers are not what they are without rebalancing.")
        return 1
    if not all(rebalance["layers"] for rebalance in run.rebalances):
        print("WRONG: a rebalance moved nothing, so nothing was shown.")
        return 1
    tokens = sum(len(answer) for answer in run.answers.values())
    print(f"Every token is what it is without rebalancing ({tokens} compared).")
    return 0


async def _both(options: argparse.Namespace) -> tuple[DemoRun, DemoRun]:
    phases: dict[str, list[Prompt]] = {}
    for name, topics in _TOPICS.items():
        first = sum(len(prompts) for prompts in phases.values())
        phases[name] = prompts_about(
            _CONFIG.model,
            topics,
            options.requests,
            first_number=first,
            max_tokens=options.tokens,
            seed=options.seed,
        )
    reference = await _run(options, phases, None)
    return reference, await _run(options, phases, RebalancingConfig(policy=options.policy, log_dir=options.log_dir))


async def _run(
    options: argparse.Namespace, phases: dict[str, list[Prompt]], rebalancing: RebalancingConfig | None
) -> DemoRun:
    """Answer all phases on a fresh server; rebalance when half of each phase was sent."""
    results = {}
    rebalances: list[dict[str, Any]] = []
    async with running_server(options.ranks, _CONFIG, rebalancing=rebalancing) as listening:
        limits = httpx.Limits(max_connections=options.concurrency + 2)
        base_url = f"http://127.0.0.1:{listening.port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits) as client:

            async def rebalance() -> None:
                rebalances.append((await client.post("/rebalance")).raise_for_status().json())

            for name, prompts in phases.items():
                midway = (len(prompts) // 2, rebalance) if rebalancing else None
                results[name] = await run_load(client, prompts, concurrency=options.concurrency, midway=midway)
            statistics = (await client.get("/statistics")).json()
    return DemoRun(phases=results, rebalances=rebalances, statistics=statistics)


def _title(options: argparse.Namespace) -> str:
    return (
        f"{2 * options.requests} requests of up to {options.tokens} tokens, {options.concurrency} at once, "
        f"{options.ranks} ranks, gloo"
    )


def _rows(reference: DemoRun, run: DemoRun) -> Iterable[tuple[str, str]]:
    yield "ms per token", "p50 / p99 / max"
    for name, result in reference.phases.items():
        yield f"{name} load, no rebalancing", _latencies(result.samples)
    for name, result in run.phases.items():
        for interval in _intervals(name, result, run.updates):
            samples = [sample for sample in result.samples if _within(sample, interval)]
            yield interval.name, _latencies(samples)
    yield "balancedness", "mean / max tokens of a rank"
    for name, result in run.phases.items():
        for interval in _intervals(name, result, run.updates):
            values = [
                value for at_s, value in run.statistics["balancedness"] if interval.begin_s <= at_s < interval.end_s
            ]
            if values and "during" not in interval.name:
                yield interval.name, f"{sum(values) / len(values):.2f}"
    num_layers = sum(len(update["commits"]) for update in run.statistics["updates"])
    durations = ", ".join(f"{(end_s - begin_s) * 1e3:.0f}" for begin_s, end_s in run.updates)
    updater, step_ms = run.statistics["updater"], run.statistics["step_ms"]
    times = f"{step_ms['p50']:.2f} / {step_ms['p99']:.2f} / {step_ms['max']:.2f}"
    yield "updates", f"{len(run.updates)} ({durations} ms), {num_layers} layers"
    yield "ms inside step()", f"{times}  ({run.statistics['passes']} passes)"
    yield "waits at a fence", f"{updater['num_fence_waits']}, {updater['fence_wait_ms']:.1f} ms together"


def _intervals(name: str, result: LoadResult, updates: Sequence[tuple[float, float]]) -> list[Interval]:
    """Cut a phase at the begin and end of its updates."""
    times = [sample.at_s for sample in result.samples]
    begin_s, end_s = min(times), max(times)
    inside = [update for update in updates if begin_s <= update[0] <= end_s]
    if not inside:
        return [Interval(f"{name} load", begin_s, end_s)]
    first_s, last_s = inside[0][0], inside[-1][1]
    return [
        Interval(f"{name} load, before the update", begin_s, first_s),
        Interval(f"{name} load, during the update", first_s, last_s),
        Interval(f"{name} load, after the update", last_s, end_s),
    ]


def _within(sample: TokenSample, interval: Interval) -> bool:
    """Return whether a token was waited for in an interval; one that was waited for during an update is of that."""
    waited_since_s = sample.at_s - sample.latency_ms / 1e3
    if "during" in interval.name:
        return waited_since_s < interval.end_s and sample.at_s > interval.begin_s
    return interval.begin_s <= waited_since_s and sample.at_s <= interval.end_s


def _latencies(samples: Sequence[TokenSample]) -> str:
    found = percentiles([sample.latency_ms for sample in samples])
    if not found:
        return "no tokens"
    return f"{found['p50']:.1f} / {found['p99']:.1f} / {found['max']:.1f}  ({len(samples)} tokens)"


if __name__ == "__main__":
    sys.exit(main())
