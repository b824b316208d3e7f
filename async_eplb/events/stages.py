"""The stages of an update, listed once, for reports, metrics, traces, the watchdog and the fuzzer."""

from dataclasses import dataclass

from async_eplb.events.schema import Event, FenceWaited, LayerCommitted, LayerPlanned, LayerTransferred


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage whose time is logged.

    :param event: event that is logged at the end of the stage, or of the stage after it
    :param duration: key of that event that holds the stage's time, in milliseconds
    :param followed_by: key of that event that holds the time from the stage's end to the event, in milliseconds; empty
        if the event is logged at the stage's end
    :param counted_by: key of that event that holds the number of what is handled
    :param label: as people read it
    :param colour: in all pictures
    """

    name: str
    event: type[Event]
    duration: str = "duration_ms"
    followed_by: str = ""
    counted_by: str = "layer"
    label: str
    colour: str

    @property
    def total(self) -> str:
        """Key of the stage's time in totals of an update."""
        return f"{self.name}_ms"


PLAN = Stage(name="plan", event=LayerPlanned, label="plan", colour="#7c6cc4")
TRANSFER = Stage(name="transfer", event=LayerTransferred, label="transfer", colour="#2a7ab9")
WAIT = Stage(
    name="wait",
    event=LayerCommitted,
    duration="wait_ms",
    followed_by="duration_ms",
    label="wait",
    colour="#d5d9de",
)
COMMIT = Stage(name="commit", event=LayerCommitted, label="commit", colour="#e07b39")

STAGES = (PLAN, TRANSFER, WAIT, COMMIT)
"""Stages that each layer goes through, in this order."""

FENCE = Stage(name="fence", event=FenceWaited, counted_by="step", label="wait at a fence", colour="#c0272d")
"""What a step loses, not a layer."""

RELAY = "relay"
AGREE = "agree"
WATCHED = (PLAN.name, TRANSFER.name, RELAY, AGREE, COMMIT.name)
"""Stages that can stall: values of ``stage`` in ``eplb.update.stalled``. The time of a layer's relay is part of its
transfer, that of agreement part of its wait."""
