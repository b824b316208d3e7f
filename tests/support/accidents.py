"""Accidents of one rank of a world of real processes, and the reports of the others."""

from dataclasses import dataclass
from typing import Literal

TRANSFER_TIMEOUT_S, CONTROL_TIMEOUT_S = 1.0, 1.5
TIMEOUTS_S = TRANSFER_TIMEOUT_S + CONTROL_TIMEOUT_S
LATE, OTHER_PLACEMENT = DIFFERENCES = ("late", "other placement")
"""Wrong ways in which a live rank may begin an update."""


@dataclass(frozen=True, slots=True)
class Accident:
    """An accident of a rank.

    :param kind: a signal's name, "cut" (all its connections are closed), or one of :data:`DIFFERENCES`
    :param phase: at which point of the update; "launch" is the beginning of a transfer, before others get a byte, and
        "turn" that of reading others, before any is told that it may
    :param transport: of the weights; ``"dist"`` is torch.distributed with the device's backend
    :param serves: whether the update is beside serving
    """

    kind: str
    phase: str
    victim: int = 1
    num_ranks: int = 3
    transport: Literal["dist", "copy"] = "dist"
    device: Literal["cpu", "cuda"] = "cpu"
    serves: bool = True
    transfer_timeout_s: float = TRANSFER_TIMEOUT_S
    control_timeout_s: float = CONTROL_TIMEOUT_S

    @property
    def reporting(self) -> list[int]:
        """Ranks that report: a rank that only differs does so too."""
        return [rank for rank in range(self.num_ranks) if rank != self.victim or self.kind in DIFFERENCES]


@dataclass(frozen=True, slots=True)
class Report:
    """The observations of a survivor."""

    rank: int
    error: str
    named: tuple[int, ...]
    layer: int
    phase: str
    detected_s: float
    num_steps_after: int
    in_doubt: bool
    members: tuple[int, ...]
    rolled_forward: tuple[int, ...]
    lost: dict[int, tuple[int, ...]]
    missing: dict[int, tuple[int, ...]]
    placement: bytes
    wrong_slots: list[tuple[int, int]]
    recovered_s: float
    num_watchdogs: int
    """Threads of torch's that end this process when NCCL fails."""
    last_committed: int = 0
