"""Deterministic simulation: whole worlds of ranks under a virtual clock and a seeded scheduler, and what goes wrong."""

from async_eplb.simulation.invariants import Invariant, Violation
from async_eplb.simulation.outcome import Outcome, simulate
from async_eplb.simulation.scenario import Mishap, Scenario, Trouble, scenario_for
from async_eplb.simulation.shrink import shrink

__all__ = [
    "Invariant",
    "Mishap",
    "Outcome",
    "Scenario",
    "Trouble",
    "Violation",
    "scenario_for",
    "shrink",
    "simulate",
]
