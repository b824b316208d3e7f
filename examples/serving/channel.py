"""JSON lines between the front and the ranks, both ways, over a socket of this machine."""

import json
import math
from collections.abc import AsyncIterator
from typing import TypedDict

import anyio
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

_MAX_LINE = 1 << 20


class RequestMessage(TypedDict):
    """A request, as :class:`serving.sequences.Request` has it."""

    number: int
    prompt: list[int]
    max_tokens: int


class ToRank(TypedDict, total=False):
    """What the front says to a rank.

    - ``wave``: grows with every message; each rank is told of each
    - ``request``: to be answered by this rank
    - ``cancel``: number of a request whose client has gone
    - ``stop``: all ranks are told this
    """

    wave: int
    request: RequestMessage
    cancel: int
    stop: bool


class FromRank(TypedDict, total=False):
    """What a rank says to the front.

    - ``rank``: which it is; said first
    - ``number``: the request that the rest is about
    - ``token``: the next of its answer
    - ``ended``: there is no further token; ``error`` says why if the request was refused
    """

    rank: int
    number: int
    token: int
    ended: bool
    error: str


class Connection:
    """Messages over a byte stream. :meth:`put` never waits; :meth:`write` must run meanwhile."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._incoming = BufferedByteReceiveStream(stream)
        self._outgoing, self._to_write = anyio.create_memory_object_stream[bytes](math.inf)

    def put(self, message: ToRank | FromRank) -> None:
        """Send a message after those put before it; drop it if the other side has gone."""
        try:
            self._outgoing.send_nowait(json.dumps(message).encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    def end(self) -> None:
        """Put no more; :meth:`write` returns when all is sent."""
        self._outgoing.close()

    async def write(self) -> None:
        """Send what is put, until ended or until the other side has gone."""
        with self._to_write:
            async for line in self._to_write:
                try:
                    await self._stream.send(line)
                except anyio.BrokenResourceError:
                    return

    async def messages(self) -> AsyncIterator[dict[str, object]]:
        """Yield what the other side sends, until it has gone."""
        try:
            while True:
                yield json.loads(await self._incoming.receive_until(b"\n", _MAX_LINE))
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError):
            return
