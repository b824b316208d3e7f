"""A rank's end of the front's channel: queues requests in the engine and sends their tokens back."""

from typing import cast

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream

from serving.channel import Connection, FromRank, RequestMessage, ToRank
from serving.engine import Engine
from serving.sequences import Request


class RankAgent:
    """Runs a rank's engine, and does what the front asks for meanwhile."""

    def __init__(self, rank: int, engine: Engine) -> None:
        self._rank = rank
        self._engine = engine
        self._scopes: dict[int, anyio.CancelScope] = {}

    async def run(self, path: str) -> None:
        """Connect to the front's socket; return when the engine has stopped and all tokens are sent."""
        async with await anyio.connect_unix(path) as stream, anyio.create_task_group() as writing:
            connection = Connection(stream)
            writing.start_soon(connection.write)
            connection.put(FromRank(rank=self._rank))
            async with anyio.create_task_group() as tasks, anyio.create_task_group() as listening:
                listening.start_soon(self._listen, connection, tasks)
                await self._engine.run()
                listening.cancel_scope.cancel()
            connection.end()

    async def _listen(self, connection: Connection, tasks: TaskGroup) -> None:
        async for received in connection.messages():
            message = cast("ToRank", received)
            if "request" in message:
                self._begin(message["request"], connection, tasks)
            if "cancel" in message and message["cancel"] in self._scopes:
                self._scopes[message["cancel"]].cancel()
            if "stop" in message:
                self._engine.stop()
            self._engine.wake(message["wave"])

    def _begin(self, message: RequestMessage, connection: Connection, tasks: TaskGroup) -> None:
        number = message["number"]
        request = Request(number=number, prompt=tuple(message["prompt"]), max_tokens=message["max_tokens"])
        try:
            tokens = self._engine.submit(request)
        except (ValueError, anyio.WouldBlock) as error:
            connection.put(FromRank(number=number, ended=True, error=str(error) or "too many requests wait"))
            return
        self._scopes[number] = anyio.CancelScope()
        tasks.start_soon(self._answer, number, tokens, connection)

    async def _answer(self, number: int, tokens: MemoryObjectReceiveStream[int], connection: Connection) -> None:
        with self._scopes[number], tokens:
            async for token in tokens:
                connection.put(FromRank(number=number, token=token))
        del self._scopes[number]
        connection.put(FromRank(number=number, ended=True))
