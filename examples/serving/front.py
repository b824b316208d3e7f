"""The front on rank 0: hands requests to the ranks and brings their tokens back."""

import math
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

import anyio
from anyio.abc import ByteStream, Listener, TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from serving.channel import Connection, FromRank, RequestMessage, ToRank


class ClosedFront(Exception):
    """The server is stopping, or not ready yet."""


@dataclass(frozen=True, slots=True)
class _Answer:
    rank: int
    tokens: MemoryObjectSendStream[int | str]


class Front:
    """Balances requests over the ranks: each goes to the rank that answers the fewest.

    :param num_ranks: ranks that will connect, rank 0 included
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.connected = anyio.Event()
        self._ranks: dict[int, Connection] = {}
        self._answers: dict[int, _Answer] = {}
        self._number = 0
        self._wave = 0
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return len(self._ranks) == self.num_ranks and not self._stopping

    async def run(self, listener: Listener[ByteStream]) -> None:
        """Talk with the ranks until all have gone."""
        async with anyio.create_task_group() as tasks:
            gone = anyio.Semaphore(0)

            async def handle(stream: ByteStream) -> None:
                try:
                    await self._handle(stream, tasks)
                finally:
                    gone.release()

            tasks.start_soon(listener.serve, handle)
            for _ in range(self.num_ranks):
                await gone.acquire()
            for answer in self._answers.values():
                answer.tokens.close()
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def answer(
        self, prompt: Sequence[int], max_tokens: int
    ) -> AsyncGenerator[MemoryObjectReceiveStream[int | str]]:
        """Have a request answered; the stream yields tokens, or at once why it is refused. Leaving cancels it.

        :raises ClosedFront: if no requests are taken
        """
        if not self.ready:
            raise ClosedFront("the server takes no requests now")
        self._number += 1
        number = self._number
        in_flight = Counter(answer.rank for answer in self._answers.values())
        rank = min(range(self.num_ranks), key=lambda rank: in_flight[rank])
        sender, receiver = anyio.create_memory_object_stream[int | str](math.inf)
        self._answers[number] = _Answer(rank, sender)
        request = RequestMessage(number=number, prompt=list(prompt), max_tokens=max_tokens)
        self._tell({rank: ToRank(request=request)})
        try:
            with receiver:
                yield receiver
        finally:
            if self._answers.pop(number, None) is not None:
                sender.close()
                self._tell({rank: ToRank(cancel=number)})

    def stop(self) -> None:
        """Take no more requests; the ranks end when they have answered those they have."""
        self._stopping = True
        self._tell({rank: ToRank(stop=True) for rank in self._ranks})

    def _tell(self, messages: dict[int, ToRank]) -> None:
        """Give some ranks a message, and every rank a new wave, so that all of them run passes."""
        self._wave += 1
        for rank, connection in self._ranks.items():
            connection.put(ToRank(wave=self._wave, **messages.get(rank, ToRank())))

    async def _handle(self, stream: ByteStream, tasks: TaskGroup) -> None:
        async with stream:
            connection = Connection(stream)
            tasks.start_soon(connection.write)
            async for message in connection.messages():
                self._hear(connection, cast("FromRank", message))
            connection.end()

    def _hear(self, connection: Connection, message: FromRank) -> None:
        if "rank" in message:
            self._ranks[message["rank"]] = connection
            if len(self._ranks) == self.num_ranks:
                self.connected.set()
            return
        number = message["number"]
        if number not in self._answers:
            return
        if "ended" in message:
            with self._answers.pop(number).tokens as tokens:
                if "error" in message:
                    tokens.send_nowait(message["error"])
        else:
            self._answers[number].tokens.send_nowait(message["token"])
