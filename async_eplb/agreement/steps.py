"""Passing step boundaries on the serving thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from async_eplb.agreement.ballot import Decision
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.arguments import Whole, take
from async_eplb.errors import BusyUpdater, StepMismatch
from async_eplb.events.emit import Logger, emit
from async_eplb.events.passes import PassTimer
from async_eplb.events.schema import FenceWaited

_NUMBER = Whole(1, 2**62)
"""Ballots have 64 bits for it."""


class Stepper:
    """Passes one boundary after another. Used by one task or thread at a time.

    :param execute: does what is due at a boundary and returns what went wrong
    :param at_boundary: called at each boundary, after that
    :param passes: is told of each boundary that was passed
    """

    def __init__(
        self,
        shared: SharedAgreement,
        logger: Logger,
        rank: int,
        execute: Callable[[Decision], Exception | None],
        *,
        at_boundary: Callable[[], None],
        passes: PassTimer,
    ) -> None:
        self._shared = shared
        self._logger = logger
        self._rank = rank
        self._execute = execute
        self._at_boundary = at_boundary
        self._passes = passes
        self._stepping = False
        self.standing_for = ""
        """Reason why this rank makes no steps at present; empty if it makes steps."""
        self.num_waits = 0
        self.wait_ms = 0.0
        self.longest_ms = 0.0

    async def step(self, number: int | None) -> None:
        """Pass the next boundary, or the one of this number; at a fence, wait as a task does."""
        boundary = _boundary(number)
        with self._one_at_a_time() as start:
            waited = False
            while not self._try(boundary):  # agreement rule 2: it waits for control threads only
                await self._shared.until(lambda: self._shared.may_pass(boundary))
                waited = True
            if waited:
                self._count_wait(start)

    def step_sync(self, number: int | None) -> None:
        """Pass the next boundary, or the one of this number; at a fence, block the calling thread."""
        boundary = _boundary(number)
        with self._one_at_a_time() as start:
            waited = False
            while not self._try(boundary):
                self._shared.wait_for_result(boundary)
                waited = True
            if waited:
                self._count_wait(start)

    @contextmanager
    def standing(self, reason: str) -> Iterator[None]:
        """Make no steps inside.

        :raises BusyUpdater: if this rank stands already, or is inside a step
        """
        self._require_free(reason)
        self.standing_for = reason
        try:
            self._passes.close()
            yield
        finally:
            self.standing_for = ""

    @contextmanager
    def _one_at_a_time(self) -> Iterator[float]:
        self._require_free("stepping")
        self._stepping = True
        start = time.perf_counter()
        try:
            yield start
            self._passes.passed(start, time.perf_counter())
        except BaseException:
            self._passes.skip()
            raise
        finally:
            self._stepping = False
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - start) * 1e3)

    def _require_free(self, wanted: str) -> None:
        current = self.standing_for or ("stepping" if self._stepping else "")
        if current:
            raise BusyUpdater(f"rank {self._rank} is {current}: {wanted} at the same time is refused")

    def _try(self, number: int) -> bool:
        """Pass a boundary and do what is due there, unless a fence stands before it."""
        passed, decision = self._shared.try_pass(number)
        error = None if decision is None else self._execute(decision)
        if passed:
            self._at_boundary()
        if error is not None:
            raise error
        return passed

    def _count_wait(self, start: float) -> None:
        wait_ms = (time.perf_counter() - start) * 1e3
        self._shared.waited()
        self.num_waits += 1
        self.wait_ms += wait_ms
        outlook = self._shared.outlook
        event = FenceWaited(
            generation=outlook.generation,
            rank=self._rank,
            step=outlook.step,
            duration_ms=wait_ms,
            lead=outlook.lead,
        )
        emit(self._logger, event)


def _boundary(number: int | None) -> int:
    """Return the number of a boundary as the engine counts it, and 0 if it does not count."""
    return 0 if number is None else take(number, _NUMBER, "number", partial(StepMismatch, steps=()))
