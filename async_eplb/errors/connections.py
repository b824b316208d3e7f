"""Errors of process groups and transports: who cannot be reached, or is somebody else than was expected."""

from async_eplb.errors.base import EplbError

# --- What was refused; nothing has changed. ---


class InvalidGroup(EplbError, ValueError):
    """There is no process group, or none by which its ranks could find each other; the message says what to pass."""


class NotAMember(InvalidGroup):
    """This process is not a member of the group: it has no part in what the group does."""


class RankMismatch(EplbError, ValueError):
    """Rank or rank count differ between the topology and the transport's group."""

    expected: int
    actual: int


class UpdaterMismatch(EplbError):
    """Ranks opened updaters over one transport that are not the same: by name, weight layout or topology.

    :param names: of the updater of each rank; empty for one without a name
    """

    names: tuple[str, ...]


class IpcUnavailable(EplbError):
    """Ranks cannot read each other's weights: the copy engine does not work here. Nothing has moved.

    :param ranks: those that reported a reason
    """

    ranks: tuple[int, ...]


class NoUsableTransport(EplbError):
    """No candidate of ``open_first_usable`` could be opened on all ranks. Nothing has moved.

    :param refusals: each candidate, and what ranks said about it
    """

    refusals: tuple[str, ...]


# --- Use at the wrong time. ---


class BusyGroup(EplbError, RuntimeError):
    """An updater of the same name, or without one as well, is open on this group; the message says what to do.

    :param ranks: where it is open
    """

    updater: str
    ranks: tuple[int, ...]


class BusyTransport(EplbError, RuntimeError):
    """A transport serves one updater; this one is in use."""


# --- What went wrong. ---


class BrokenTransport(EplbError):
    """A transport failed or was aborted. It is never reused: open a new one."""

    rank: int


class TransferTimeout(BrokenTransport):
    """A layer's exchange did not finish before its deadline."""

    layer: int
    timeout_s: float


class BrokenLoadGroup(EplbError):
    """Loads could not be summed over ranks: a rank is dead, closed, or did not take part.

    :param missing: ranks that did not open their load group, if it was not opened in time
    """

    rank: int
    timeout_s: float
    missing: tuple[int, ...] = ()


class BrokenControlGroup(EplbError):
    """A control round did not complete: a rank is dead, closed, or never began the update.

    :param missing: ranks that sent no ballot, as far as this is known
    """

    rank: int
    timeout_s: float
    missing: tuple[int, ...] = ()


class OpenTimeout(BrokenControlGroup):
    """Not all ranks came in time to what they open together; ``missing`` names those that did not."""
