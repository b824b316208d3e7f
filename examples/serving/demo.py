"""``scripts/demo --serve``: a server under skewed, then shifting load, rebalanced while it answers."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import anyio
import httpx

from async_eplb.cli.render import print_table
from serving.client import LoadResult, Prompt, TokenSample, prompts_about, run_load
from serving.config import ModelConfig, ServingConfig
from serving.launcher import running_server
from serving.rank import Rebalancing, percentiles

_CONFIG = ServingConfig(slots_per_expert=1.25, dispatch="round_robin", model=ModelConfig(num_logical_experts=32))
_TOPICS = {"skewed": (0, 1), "shifted": (5, 4)}
"""What the prompts of each phase are about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What came of one run.

    :param phases: name → result, in order
    :param updates: of rank 0: begin and end, as the statistics say
    :param balancedness: when a chunk of passes began, and the ranks' balance in it
    """

    phases: dict[str, LoadResult]
    updates: list[tuple[float, float]]
    balancedness: list[tuple[float, float]]

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
        "rebalance its experts during each. The same prompts are first answered without rebalancing; exit status 0 "
        "only if every token is the same.",
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--requests", type=int, default=64, help="of each phase (default: 64)")
    parser.add_argument("--tokens", type=int, default=24, help="that each answer has (default: 24)")
    parser.add_argument("--concurrency", type=int, default=24, help="requests at once (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    options = parser.parse_args(arguments)
    reference, run = anyio.run(_both, options)
    wrong = sum(reference.answers[number] != answer for number, answer in run.answers.items())
    print_table(_title(options), list(_rows(reference, run)))
    if wrong or len(run.answers) != len(reference.answers):
        print(f"WRONG: {wrong} of {len(reference.answers)} answers are not what they are without rebalancing.")
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
    reference = await _run(options, phases, "off")
    return reference, await _run(options, phases, "blocking")


async def _run(options: argparse.Namespace, phases: dict[str, list[Prompt]], rebalancing: Rebalancing) -> DemoRun:
    """Answer all phases on a fresh server; rebalance when half of each phase was sent."""
    results = {}
    async with running_server(options.ranks, _CONFIG, rebalancing=rebalancing) as listening:
        limits = httpx.Limits(max_connections=options.concurrency + 2)
        base_url = f"http://127.0.0.1:{listening.port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits) as client:

            async def rebalance() -> None:
                (await client.post("/rebalance")).raise_for_status()

            for name, prompts in phases.items():
                midway = (len(prompts) // 2, rebalance)
                results[name] = await run_load(client, prompts, concurrency=options.concurrency, midway=midway)
            statistics = (await client.get("/statistics")).json()
    updates = [(update["begun_s"], update["ended_s"]) for update in statistics["updates"]]
    return DemoRun(phases=results, updates=updates, balancedness=statistics["balancedness"])


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
            yield f"{interval.name}, rebalancing", _latencies(samples)
    yield "balancedness", "mean / max tokens of a rank"
    for name, result in run.phases.items():
        for interval in _intervals(name, result, run.updates):
            values = [value for at_s, value in run.balancedness if interval.begin_s <= at_s < interval.end_s]
            if values and "during" not in interval.name:
                yield interval.name, f"{sum(values) / len(values):.2f}"
    longest_ms = max(((end_s - begin_s) * 1e3 for begin_s, end_s in run.updates), default=0.0)
    yield "rebalances", f"{len(run.updates)}, the longest {longest_ms:.0f} ms"


def _intervals(name: str, result: LoadResult, updates: Sequence[tuple[float, float]]) -> list[Interval]:
    """Cut a phase at the begin and end of its updates."""
    times = [sample.at_s for sample in result.samples]
    begin_s, end_s = min(times), max(times)
    inside = [update for update in updates if begin_s <= update[0] <= end_s]
    if not inside:
        return [Interval(f"{name} load", begin_s, end_s)]
    first_s, last_s = inside[0][0], inside[-1][1]
    return [
        Interval(f"{name} load, before", begin_s, first_s),
        Interval(f"{name} load, during", first_s, last_s),
        Interval(f"{name} load, after", last_s, end_s),
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
