"""The modes of an update, and the rules by which transfers are launched."""

from enum import Enum


class Mode(Enum):
    """Whether the model serves beside an update."""

    EXCLUSIVE = "exclusive"
    """Nobody serves: an agreed layer is committed at once."""
    SERVING = "serving"
    """The model serves: layers are committed at agreed boundaries."""


class LaunchRule(Enum):
    """When a rank may begin a wave's transfer."""

    AT_ONCE = "at once"
    """When it has plan and buffer itself."""
    GRANTED = "granted"
    """When all ranks have: then the layer's live weights may be read on all of them."""
    ORDERED = "ordered"
    """At an agreed boundary, while the model serves; otherwise at once."""
    GRANTED_IN_ORDER = "granted in order"
    """The same, and otherwise when it is granted."""

    @property
    def needs_grant(self) -> bool:
        """Whether no rank may begin before all have plan and buffer."""
        return self in {LaunchRule.GRANTED, LaunchRule.GRANTED_IN_ORDER}

    @property
    def needs_order(self) -> bool:
        """Whether all ranks begin at the same boundary, while the model serves."""
        return self in {LaunchRule.ORDERED, LaunchRule.GRANTED_IN_ORDER}
