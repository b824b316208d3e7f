"""A load generator: real HTTP requests about few topics, and the latency of every token."""

import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field

import anyio
import httpx
import numpy as np

from serving.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request of the load."""

    number: int
    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One token after the first of its answer.

    :param at_s: when it arrived, on this machine's monotonic clock
    :param latency_ms: time since the token before
    """

    at_s: float
    latency_ms: float


@dataclass(slots=True)
class LoadResult:
    """What came back.

    :param answers: tokens by the prompt's number
    :param first_ms: time to each request's first token
    """

    answers: dict[int, list[int]] = field(default_factory=dict)
    samples: list[TokenSample] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)


def prompts_about(
    config: ModelConfig, topics: Sequence[int], num_prompts: int, *, first_number: int, max_tokens: int, seed: int
) -> list[Prompt]:
    """Draw prompts of 4 to 16 tokens, each about one topic, early topics of ``topics`` more often than late ones.

    :param max_tokens: length of the longest answer; the shortest is half as long
    """
    rng = np.random.default_rng([seed, first_number])
    weights = 0.5 ** np.arange(len(topics))
    drawn = rng.choice(topics, num_prompts, p=weights / weights.sum())
    texts = [tuple(rng.choice(config.tokens_of(topic), rng.integers(4, 17)).tolist()) for topic in drawn.tolist()]
    lengths = rng.integers(max_tokens // 2, max_tokens + 1, num_prompts).tolist()
    numbers = range(first_number, first_number + num_prompts)
    return [Prompt(*request) for request in zip(numbers, texts, lengths, strict=True)]


async def run_load(
    client: httpx.AsyncClient,
    prompts: Iterable[Prompt],
    *,
    concurrency: int,
    midway: tuple[int, Callable[[], Coroutine[None, None, None]]] | None = None,
) -> LoadResult:
    """Send all prompts, so many at once.

    :param midway: called once, after that many prompts were sent; the others are sent meanwhile
    """
    result = LoadResult()
    queue = iter(list(prompts))
    num_sent = 0

    async def work() -> None:
        nonlocal num_sent
        for prompt in queue:
            num_sent += 1
            if midway is not None and num_sent == midway[0]:
                tasks.start_soon(midway[1])
            await _ask(client, prompt, result)

    async with anyio.create_task_group() as tasks:
        for _ in range(concurrency):
            tasks.start_soon(work)
    return result


async def generate(client: httpx.AsyncClient, tokens: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
    """Yield an answer's tokens as they arrive.

    :raises httpx.HTTPStatusError: if the request is refused
    """
    body = {"prompt": list(tokens), "max_tokens": max_tokens}
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            yield int(json.loads(line)["token"])


async def _ask(client: httpx.AsyncClient, prompt: Prompt, result: LoadResult) -> None:
    before_s = time.monotonic()
    answer: list[int] = []
    async for token in generate(client, prompt.tokens, prompt.max_tokens):
        now_s = time.monotonic()
        latency_ms = (now_s - before_s) * 1e3
        if answer:
            result.samples.append(TokenSample(now_s, latency_ms))
        else:
            result.first_ms.append(latency_ms)
        answer.append(token)
        before_s = now_s
    result.answers[prompt.number] = answer
