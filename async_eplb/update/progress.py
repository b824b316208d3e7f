"""How far an update is on this rank."""

from dataclasses import dataclass, field

from async_eplb.events.schema import LayerCommitted
from async_eplb.update.layer import LayerInFlight


@dataclass(slots=True, eq=False)
class Progress:
    """Prefix counts of an update's layers on this rank: planned >= loaded >= launched >= staged >= copied >= finished.

    Each count is advanced by one stage only. A layer is copied when its commit is enqueued, and finished when that is
    done on the device.

    :param rows: layers that change, in update order
    :param layers: those that are loaded
    :param agreed: as the update ended: layers that may be committed on all ranks
    :param landed: layers whose commit is done on the device, as they were logged
    :param copy_failed: a layer that was agreed on could not be copied here
    """

    rows: tuple[int, ...]
    layers: list[LayerInFlight] = field(default_factory=list)
    planned: int = 0
    launched: int = 0
    staged: int = 0
    agreed: int = 0
    copied: int = 0
    finished: int = 0
    landed: list[LayerCommitted] = field(default_factory=list)
    copy_failed: bool = False

    @property
    def loaded(self) -> int:
        """Layers that have a staging buffer, or had one."""
        return len(self.layers)

    @property
    def committed_rows(self) -> tuple[int, ...]:
        """Layers that are new here, in update order."""
        return self.rows[: self.copied]

    @property
    def uncopied_rows(self) -> tuple[int, ...]:
        """Layers that were agreed on, and are not new here."""
        return self.rows[self.copied : self.agreed]

    @property
    def uncopied(self) -> tuple[LayerInFlight, ...]:
        """Layers that are staged, and not new here."""
        return tuple(self.layers[self.copied : self.staged])

    @property
    def row_under_way(self) -> int:
        """The first layer that is not new here; -1 if all are."""
        return (*self.rows, -1)[self.copied]

    def phase(self, *, in_doubt: bool) -> str:
        """Return what the layer under way was at when the update ended; empty if there is none.

        :param in_doubt: whether a round was lost that may have decided on it
        """
        phases = {
            "commit": self.agreed > self.copied,
            "fence": in_doubt,
            "staged": self.staged > self.copied,
            "transfer": self.planned > self.copied,
            "planning": self.copied < len(self.rows),
        }
        return next((phase for phase, holds in phases.items() if holds), "")
