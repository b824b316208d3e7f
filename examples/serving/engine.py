"""Continuous batching: one loop a rank that admits requests, runs forward passes and streams tokens.

The loop is a task of the event loop that serves HTTP. What blocks, the forward pass and the ranks' agreement before
it, runs in one worker thread, and the loop waits for it: so passes and ``step`` alternate, their device work is
enqueued in the same order on every rank, and requests are answered meanwhile. ``step`` itself is called in the loop's
thread. On CPUs, and with CUDA's default stream, which is the same for all threads, that is the order that counts; an
engine with a stream of its own calls ``step`` where that stream is current.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import anyio
import torch
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from torch import Tensor
from torch.distributed import ProcessGroup

from serving.boundary import StepBoundary
from serving.config import EngineConfig, ModelConfig
from serving.exchange import gather_rows
from serving.model import row_capacity
from serving.passes import Notice, PassLog, PassPlan, PassRecord
from serving.sequences import Batch, Request, RunningSequence

T = TypeVar("T")


class Model(Protocol):
    """One rank of a model."""

    config: ModelConfig
    device: torch.device
    received_rows: list[int]

    def forward(self, batch: Batch, capacity: int) -> Tensor:
        """Return the logits of each sequence's next token."""
        ...


@dataclass(slots=True, eq=False)
class _Answer:
    sequence: RunningSequence
    tokens: MemoryObjectSendStream[int]


@dataclass(slots=True)
class _Waiting:
    request: Request
    tokens: MemoryObjectSendStream[int]


class Engine:
    """One rank of the engine; its peers run the same loop.

    :param group: a group of CPUs, which only this engine uses
    """

    def __init__(self, model: Model, boundary: StepBoundary, group: ProcessGroup, config: EngineConfig) -> None:
        self._model = model
        self._boundary = boundary
        self._group = group
        self._config = config
        self._waiting: deque[_Waiting] = deque()
        self._running: list[_Answer] = []
        self._wave = 0
        self._woken = anyio.Event()
        self._stopping = False
        self._thread = anyio.CapacityLimiter(1)
        self.log = PassLog()
        self.number = 0
        """Passes so far: dummy ones count, idle time does not."""

    @property
    def num_requests(self) -> int:
        """Requests that run or wait on this rank."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: Request) -> MemoryObjectReceiveStream[int]:
        """Queue a request; return the stream of its tokens, which ends with the last. Closing it ends the request.

        :raises ValueError: if the request cannot be served
        :raises anyio.WouldBlock: if the queue is full
        """
        refusal = request.refusal(self._model.config, self._config.max_pass_tokens)
        if refusal:
            raise ValueError(refusal)
        if len(self._waiting) >= self._config.max_queue:
            raise anyio.WouldBlock
        sender, receiver = anyio.create_memory_object_stream[int](math.inf)
        self._waiting.append(_Waiting(request, sender))
        return receiver

    def wake(self, wave: int) -> None:
        """Say that the front has sent something to some rank: an idle engine runs passes again.

        :param wave: grows with every message of the front; each rank is told of each
        """
        self._wave = wave
        self._woken.set()

    def stop(self) -> None:
        """Let the engines of all ranks end when no rank has work. Wake them if they may be idle."""
        self._stopping = True

    async def run(self) -> None:
        """Serve until stopped."""
        while True:
            begun_s = time.monotonic()
            self._admit()
            batch = Batch.of([answer.sequence for answer in self._running], self._model.device)
            plan, rank_rows = await self._agree(len(batch.tokens))
            if plan.stop:
                return
            if plan.idle:
                async with self._boundary.idle():
                    await self._wait_for_wave_after(plan.wave)
                continue
            self.number += 1
            stepping_s = time.monotonic()
            await self._boundary.step(self.number)
            stepped_s = time.monotonic()
            self._deliver(batch, await self._blocking(partial(self._sample, batch, plan.max_rows)))
            self.log.records.append(
                PassRecord(
                    number=self.number,
                    begun_s=begun_s,
                    step_ms=(stepped_s - stepping_s) * 1e3,
                    pass_ms=(time.monotonic() - begun_s) * 1e3,
                    num_rows=len(batch.tokens),
                    rank_rows=rank_rows,
                )
            )

    def _admit(self) -> None:
        """Begin requests, first come first served, as far as the limits of a pass go."""
        num_rows = len(self._running)
        while self._waiting and len(self._running) < self._config.max_batch:
            first = self._waiting[0]
            num_rows += len(first.request.prompt)
            if num_rows > self._config.max_pass_tokens or first.request.not_before > self.number + 1:
                return
            self._waiting.popleft()
            sequence = RunningSequence.of(first.request, self._model.config, self._model.device)
            self._running.append(_Answer(sequence, first.tokens))

    async def _agree(self, num_rows: int) -> tuple[PassPlan, tuple[tuple[int, ...], ...]]:
        """Hear all ranks' notices; return what follows, and the rows that each rank's experts computed last."""
        notice = Notice(self._wave, num_rows, int(self.num_requests > 0), int(self._stopping))
        rows = await self._blocking(partial(gather_rows, self._group, (*notice, *self._model.received_rows)))
        width = len(Notice._fields)
        plan = PassPlan.of([Notice(*row[:width]) for row in rows])
        return plan, tuple(tuple(row[width:]) for row in rows)

    async def _wait_for_wave_after(self, wave: int) -> None:
        while self._wave <= wave:
            self._woken = anyio.Event()
            await self._woken.wait()

    def _sample(self, batch: Batch, max_rows: int) -> list[int]:
        """Run a forward pass; return the likeliest token of each sequence."""
        tokens: list[int] = self._model.forward(batch, row_capacity(max_rows)).argmax(-1).tolist()
        return tokens

    def _deliver(self, batch: Batch, tokens: list[int]) -> None:
        """Stream the tokens of a pass, and end what has ended."""
        for span, token in zip(batch.spans, tokens, strict=True):
            span.sequence.generated.append(token)
        for answer in list(self._running):
            try:
                answer.tokens.send_nowait(answer.sequence.generated[-1])
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                self._end(answer)
                continue
            if answer.sequence.finished:
                self._end(answer)

    def _end(self, answer: _Answer) -> None:
        answer.tokens.close()
        self._running.remove(answer)

    async def _blocking(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function, limiter=self._thread)
