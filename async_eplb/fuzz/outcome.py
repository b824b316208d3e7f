"""Run one scenario to its end, and return its outcome."""

import hashlib
from dataclasses import dataclass
from typing import Any

from async_eplb.events.emit import Logger
from async_eplb.fuzz.invariants import Invariant, Violation
from async_eplb.fuzz.loop import SimulatedLoop, Stuck, run
from async_eplb.fuzz.scenario import Scenario
from async_eplb.fuzz.world import SimulatedWorld


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in a scenario.

    :param violation: of an invariant; None if all were true to the end
    :param trace: a hash of every choice and every logged event: equal for equal scenarios
    :param num_events: callbacks of the event loop that ran
    :param failures: names of the errors that ranks failed with
    :param virtual_s: time on the simulated clock
    """

    scenario: Scenario
    violation: Violation | None
    trace: str
    num_events: int
    num_recoveries: int
    failures: tuple[str, ...]
    virtual_s: float


class _TraceLogger:
    """Adds logged events to a trace, without the times that a host took."""

    def __init__(self, rank: int, trace: "hashlib.blake2b") -> None:
        self._rank = rank
        self._trace = trace

    def bind(self, **values: Any) -> "_TraceLogger":  # noqa: ANN401, ARG002 - a run has another name each time
        return self

    def _log(self, name: str, **values: Any) -> None:  # noqa: ANN401 - values of events
        known = {key: value for key, value in values.items() if not key.endswith(("_ms", "_s")) and key not in _VARYING}
        self._trace.update(repr((self._rank, name, known)).encode())

    debug = info = warning = error = _log


_MAX_EVENTS = 50_000
_VARYING = frozenset({"overlap", "run_id", "num_passes_by_time"})
"""Fields of logged events that differ from run to run, besides times."""


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario and return its outcome. Equal scenarios give equal outcomes."""
    trace = hashlib.blake2b(digest_size=8)
    loop = SimulatedLoop(scenario.seed)
    violation: Violation | None = None
    world: SimulatedWorld | None = None

    def log_to(rank: int) -> Logger:
        return _TraceLogger(rank, trace)  # type: ignore[return-value]

    def after_event(rank: int | None) -> None:
        if world is not None:
            world.after_event(rank)
        if loop.num_events > _MAX_EVENTS:
            raise Violation(Invariant.ENDS_IN_TIME, f"no end after {_MAX_EVENTS} events")

    async def main() -> None:
        nonlocal world
        world = SimulatedWorld(scenario, loop, log_to)
        await world.run()

    loop.after_event = after_event
    try:
        run(loop, main)
    except Stuck as stuck:
        violation = Violation(Invariant.ENDS_IN_TIME, f"all ranks wait for ever: {stuck}")
    except Exception as error:  # noqa: BLE001 - any error that a rank should not have raised
        violation = _violation(error)
    trace.update(repr(loop.history).encode())
    return Outcome(
        scenario=scenario,
        violation=violation,
        trace=trace.hexdigest(),
        num_events=loop.num_events,
        num_recoveries=0 if world is None else world.num_recoveries,
        failures=() if world is None else tuple(world.failures),
        virtual_s=loop.time(),
    )


def _violation(error: Exception) -> Violation:
    """Return the violation that ended a run, unpacked from exception groups; any other error is one, too."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Violation):
        return error
    violation = Violation(Invariant.TYPED_ERRORS, f"an unexpected {error!r}")
    violation.__cause__ = error
    return violation
