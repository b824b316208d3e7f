"""Deterministic simulation: whole worlds of ranks under a virtual clock and a seeded scheduler, and what goes wrong."""

from async_eplb.fuzz.invariants import Invariant, Violation
from async_eplb.fuzz.outcome import Outcome, simulate
from async_eplb.fuzz.scenario import Mishap, Scenario, Traffic, Trouble, Tuning, scenario_for
from async_eplb.fuzz.shrink import shrink

__all__ = [
    "Invariant",
    "Mishap",
    "Outcome",
    "Scenario",
    "Traffic",
    "Trouble",
    "Tuning",
    "Violation",
    "scenario_for",
    "shrink",
    "simulate",
]
