"""The states of an updater, from its construction to its end, and which may follow which."""

from enum import Enum

from async_eplb.errors import ClosedUpdater
from async_eplb.event_loop import HomeLoop


class LifeState(Enum):
    """Where an updater is between its construction and its end."""

    NEW = "new"
    OPEN = "open"
    BROKEN = "broken"
    """Until it recovers: ranks may have different layers, or no way to agree."""
    LEFT = "left"


# OPEN to OPEN: a recovery where nothing was broken.
_ALLOWED = {
    LifeState.NEW: {LifeState.OPEN, LifeState.LEFT},
    LifeState.OPEN: {LifeState.OPEN, LifeState.BROKEN, LifeState.LEFT},
    LifeState.BROKEN: {LifeState.BROKEN, LifeState.OPEN, LifeState.LEFT},
    LifeState.LEFT: set(LifeState),
}


class Life:
    """The state of an updater, why it is in it, and the event loop that it lives in."""

    def __init__(self) -> None:
        self.home = HomeLoop()
        self.state = LifeState.NEW
        self.reason = "it was not entered yet"
        """Why no update can begin; empty while the state is OPEN."""

    def enter(self, state: LifeState, reason: str = "") -> None:
        """Change state; the first reason to be in a state stays, and LEFT does, whatever ends after that.

        :raises RuntimeError: if the table does not allow it; the state stays as it was
        """
        if state not in _ALLOWED[self.state]:
            raise RuntimeError(f"an updater that is {self.state.value} cannot become {state.value}")
        if state is not self.state and self.state is not LifeState.LEFT:
            self.state, self.reason = state, reason

    def require_entered(self, purpose: str) -> None:
        """Check that the updater is entered and not left, broken or not.

        :param purpose: names the updater, and what it cannot do
        :raises ClosedUpdater: if not
        """
        if self.state in {LifeState.NEW, LifeState.LEFT}:
            raise ClosedUpdater(purpose)
