"""The HTTP front: generate, health, statistics, rebalance."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Final

import uvicorn
from anyio.streams.memory import MemoryObjectReceiveStream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from async_eplb.errors import ClosedRebalancer, RebalanceFailed
from serving.front import ClosedFront, Front

_DRAIN_S: Final = 5


def build_app(
    front: Front,
    statistics: Callable[[], dict[str, object]],
    rebalance_now: Callable[[], Awaitable[dict[str, object]]] | None,
) -> Starlette:
    """Return the application.

    - ``POST /generate`` ``{"prompt": [token, ...] or "text": "...", "max_tokens": n}`` streams ``{"token": t}`` lines;
      a text's tokens are its UTF-8 bytes
    - ``GET /health``: 200 when requests are taken, else 503
    - ``GET /statistics``: of rank 0
    - ``POST /rebalance``: all ranks rebalance; answered with what was done, when it is done. 409 if experts do not move

    :param statistics: of this rank
    :param rebalance_now: None if experts do not move
    """

    async def generate(request: Request) -> Response:
        try:
            prompt, max_tokens = _parsed(await request.body())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        async with AsyncExitStack() as stack:
            try:
                tokens = await stack.enter_async_context(front.answer(prompt, max_tokens))
            except ClosedFront as error:
                return JSONResponse({"error": str(error)}, 503)
            first = await anext(aiter(tokens), "the server ended")
            if isinstance(first, str):
                return JSONResponse({"error": first}, 400)
            return StreamingResponse(_lines(first, tokens, stack.pop_all()), media_type="application/x-ndjson")
        raise AssertionError("unreachable")

    async def health(_request: Request) -> Response:
        ready = front.ready
        return JSONResponse({"ready": ready, "ranks": front.num_ranks}, 200 if ready else 503)

    async def show_statistics(_request: Request) -> Response:
        return JSONResponse(statistics())

    async def rebalance(_request: Request) -> Response:
        if rebalance_now is None:
            return JSONResponse({"error": "this server does not rebalance"}, 409)
        try:
            return JSONResponse(await rebalance_now())
        except (ClosedRebalancer, RebalanceFailed) as error:
            return JSONResponse({"error": str(error)}, 503)

    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/health", health),
            Route("/statistics", show_statistics),
            Route("/rebalance", rebalance, methods=["POST"]),
        ]
    )


class HttpServer(uvicorn.Server):
    """Serves an application on a socket until told to stop; leaves signals to its owner."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_DRAIN_S, ws="none")
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def run_on(self, listener: socket.socket) -> None:
        """Serve until :meth:`stop`."""
        await self.serve(sockets=[listener])

    def stop(self) -> None:
        """End when open responses have ended."""
        self.should_exit = True


async def _lines(
    first: int, tokens: MemoryObjectReceiveStream[int | str], leaving: AsyncExitStack
) -> AsyncIterator[bytes]:
    async with leaving:
        yield _line(first)
        async for token in tokens:
            yield _line(token)


def _line(token: int | str) -> bytes:
    return json.dumps({"token": token}).encode() + b"\n"


def _parsed(body: bytes) -> tuple[list[int], int]:
    """Return prompt and number of tokens to generate.

    :raises ValueError: if the body is not such a request
    """
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("the body is a JSON object")  # noqa: TRY004 - a value from outside
    max_tokens = document.get("max_tokens", 16)
    prompt = document.get("prompt")
    if isinstance(document.get("text"), str):
        prompt = list(document["text"].encode())
    if not isinstance(max_tokens, int) or not isinstance(prompt, list) or not all(isinstance(t, int) for t in prompt):
        raise ValueError('needs "prompt", a list of tokens, or "text", and "max_tokens", a number')
    return prompt, max_tokens
