"""The example server from outside: its HTTP front, how it ends, and its demo."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

from serving.client import generate, prompts_about, run_load
from serving.config import RebalancingConfig, ServingConfig
from serving.demo import main as demo
from serving.launcher import running_server

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = ServingConfig()


@pytest.fixture
def anyio_backend() -> str:
    """The HTTP server runs on asyncio only."""
    return "asyncio"


@asynccontextmanager
async def connected() -> AsyncIterator[httpx.AsyncClient]:
    """Run a server of two ranks and a client of it."""
    async with running_server(2, CONFIG, rebalancing=RebalancingConfig()) as listening:
        base_url = f"http://127.0.0.1:{listening.port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
            yield client


@pytest.mark.anyio
async def test_answers_survive_rebalances() -> None:
    """The same prompts get the same tokens before, while and after experts move, and statistics show the moves."""
    prompts = prompts_about(CONFIG.model, (0, 1), 8, first_number=0, max_tokens=12, seed=0)
    async with connected() as client:
        rebalances = []

        async def rebalance() -> None:
            rebalances.append((await client.post("/rebalance")).raise_for_status().json())

        before = await run_load(client, prompts, concurrency=4)
        while_moving = await run_load(client, prompts, concurrency=4, midway=(2, rebalance))
        after = await run_load(client, prompts, concurrency=4)
        statistics = (await client.get("/statistics")).json()
    assert before.answers == while_moving.answers == after.answers
    assert [len(before.answers[prompt.number]) for prompt in prompts] == [prompt.max_tokens for prompt in prompts]
    (rebalance_done,) = rebalances
    (update,) = statistics["updates"]
    assert [layer for layer, _ in update["commits"]] == rebalance_done["layers"] != []
    assert statistics["rebalancer"]["num_moved"] == statistics["updater"]["num_updates_finished"] == 1
    assert statistics["updater"]["step"] == statistics["passes"] > 0


@pytest.mark.anyio
async def test_an_idle_server_rebalances() -> None:
    """An update ends although no pass is made, and the next requests are answered with what it moved."""
    prompts = prompts_about(CONFIG.model, (2,), 4, first_number=0, max_tokens=8, seed=0)
    async with connected() as client:
        before = await run_load(client, prompts, concurrency=4)
        passes = (await client.get("/statistics")).json()["passes"]
        assert (await client.post("/rebalance")).raise_for_status().json()["layers"]
        statistics = (await client.get("/statistics")).json()
        assert statistics["passes"] == passes
        assert {step for _, step in statistics["updates"][0]["commits"]} == {passes + 1}
        after = await run_load(client, prompts, concurrency=4)
    assert before.answers == after.answers


@pytest.mark.anyio
@pytest.mark.parametrize("num_tokens", [1, 20, 50])
async def test_a_server_that_ends_while_it_rebalances_ends_well(num_tokens: int) -> None:
    """Told to end during one of many rebalances, it answers what it has taken; no process fails."""
    prompts = prompts_about(CONFIG.model, range(8), 8, first_number=0, max_tokens=16, seed=0)
    rebalancing = RebalancingConfig(policy="global", every_steps=1)
    answers = []
    told = anyio.Semaphore(0)

    async def ask(client: httpx.AsyncClient, tokens: tuple[int, ...]) -> None:
        answer = []
        async for token in generate(client, tokens, 16):
            answer.append(token)
            told.release()
        answers.append(answer)

    async with (
        httpx.AsyncClient(timeout=30) as client,
        anyio.create_task_group() as tasks,
        running_server(2, CONFIG, rebalancing=rebalancing) as listening,
    ):
        client.base_url = httpx.URL(f"http://127.0.0.1:{listening.port}")
        for prompt in prompts:
            tasks.start_soon(ask, client, prompt.tokens)
        for _ in range(num_tokens):
            await told.acquire()
    assert [len(answer) for answer in answers] == [16] * len(prompts)


@pytest.mark.anyio
async def test_a_server_that_does_not_rebalance_says_so() -> None:
    """Status 409, and a reason."""
    async with running_server(1, CONFIG) as listening, httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{listening.port}/rebalance")
    assert (response.status_code, response.json()["error"]) == (409, "this server does not rebalance")


@pytest.mark.anyio
async def test_bad_requests_are_refused() -> None:
    """A request that cannot be served gets status 400 and a reason, and the next one is served."""
    bodies: list[dict[str, object]] = [
        {"prompt": [1 << 20]},
        {"prompt": []},
        {"prompt": "text"},
        {"prompt": [1] * 100},
        {"prompt": [1], "max_tokens": 1000},
        {"max_tokens": 3},
    ]
    async with connected() as client:
        for body in bodies:
            response = await client.post("/generate", json=body)
            assert (response.status_code, bool(response.json()["error"])) == (400, True), body
        assert (await client.post("/generate", content=b"nothing")).status_code == 400
        assert (await client.get("/health")).json() == {"ready": True, "ranks": 2}
        assert (await client.post("/generate", json={"text": "hello", "max_tokens": 2})).status_code == 200


@pytest.mark.anyio
async def test_a_client_that_leaves_ends_its_request() -> None:
    """More requests than the engines run at once are answered only because abandoned ones end."""
    async with connected() as client:

        async def abandon() -> None:
            async for _ in generate(client, [1], 100):
                return

        async with anyio.create_task_group() as tasks:
            for _ in range(2 * CONFIG.engine.max_batch):
                tasks.start_soon(abandon)
        passes = (await client.get("/statistics")).json()["passes"]
        assert [token async for token in generate(client, [1], 3)]
        assert (await client.get("/statistics")).json()["passes"] < passes + 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(number: signal.Signals) -> None:
    """Interrupted, terminated or killed: all of its processes end, and the first two are a success."""
    command = [sys.executable, "-m", "serving", "--ranks", "2", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "2 ranks serve on http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.read() == ""  # ends when the last process that could write has ended
    assert process.returncode == (-number if number == signal.SIGKILL else 0)


def test_the_demo_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """It exits 0 and prints the verdict. The second half of a phase follows some answers, so that there are counts."""
    assert demo(["--serve", "--ranks", "2", "--requests", "12", "--tokens", "8", "--concurrency", "3"]) == 0
    assert "Every token is what it is without rebalancing" in capsys.readouterr().out
