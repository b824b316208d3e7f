"""How an update ends early: which cause counts, what other ranks get, what stays, and whether ranks can go on."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from async_eplb.agreement.ballot import Status
from async_eplb.agreement.outlook import PeerFaults
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import (
    BrokenControlGroup,
    BrokenTransport,
    CommitFailed,
    EplbError,
    GenerationMismatch,
    PlacementDisagreement,
    SkippedPass,
    StepMismatch,
    TransferTimeout,
    UpdateAborted,
    UpdateCancelled,
    UpdateNotBegun,
    UpdateStalled,
    VerificationError,
)


class Then(Enum):
    """Conditions of the next update."""

    NOTHING = "the next update can begin"
    RECOVER = "recover(), on all ranks"


class Stays(Enum):
    """State of the layers after the end, on ranks that serve on."""

    AS_AGREED = "what was agreed is committed, on all ranks the same layers; the others keep their old weights"
    IN_DOUBT = "the same; a layer whose round was lost is in doubt until recover()"
    TORN = "the same, but here a layer that was agreed on is not copied, until recover()"
    NOTHING_MOVED = "nothing was moved"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to end early.

    :param cause: the error on this rank
    :param gives: the status that this rank's ballots have from then on
    :param peers: the error on the other ranks
    """

    cause: type[Exception]
    gives: Status
    peers: type[EplbError]
    stays: Stays
    then: Then


OUTCOMES = (
    Outcome(UpdateCancelled, Status.CANCEL, UpdateCancelled, Stays.AS_AGREED, Then.NOTHING),
    Outcome(BrokenControlGroup, Status.FAILED, BrokenControlGroup, Stays.IN_DOUBT, Then.RECOVER),
    Outcome(GenerationMismatch, Status.FAILED, GenerationMismatch, Stays.NOTHING_MOVED, Then.NOTHING),
    Outcome(UpdateNotBegun, Status.FAILED, UpdateNotBegun, Stays.NOTHING_MOVED, Then.NOTHING),
    Outcome(PlacementDisagreement, Status.OK, PlacementDisagreement, Stays.NOTHING_MOVED, Then.NOTHING),
    Outcome(SkippedPass, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(StepMismatch, Status.FAILED, StepMismatch, Stays.AS_AGREED, Then.NOTHING),
    Outcome(CommitFailed, Status.IN_DOUBT, UpdateAborted, Stays.TORN, Then.RECOVER),
    Outcome(UpdateStalled, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(TransferTimeout, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(BrokenTransport, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(VerificationError, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(UpdateAborted, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
    Outcome(Exception, Status.FAILED, UpdateAborted, Stays.AS_AGREED, Then.NOTHING),
)
"""The first whose cause an error is tells what follows. RELIABILITY.md shows them as accidents that were tried."""


def outcome_of(error: Exception) -> Outcome:
    """Return what follows from an error that ended an update."""
    return next(outcome for outcome in OUTCOMES if isinstance(error, outcome.cause))


def needs_recovery(error: Exception | None, faults: PeerFaults, *, in_doubt: bool) -> bool:
    """Return whether this rank and its peers can go on together only after ``recover()``.

    :param in_doubt: a peer may have committed what this rank has not
    """
    if error is None:
        return False
    return in_doubt or faults.lost is not None or outcome_of(error).then is Then.RECOVER


def cause_of_end(own: Exception | None, faults: PeerFaults) -> Exception | None:
    """Return the error that counts, of this rank's own and what ballots told of others; None if there is none.

    An exchange that broke because its peer is lost is not the cause.
    """
    if faults.lost is not None and isinstance(own, BrokenTransport):
        faults.lost.__context__ = own
        return faults.lost
    if own is not None:
        return own
    failed, gone = _aborted(faults.failed, "failed; see their errors"), _aborted(faults.gone, "have left")
    return faults.error or faults.lost or failed or gone


def _aborted(ranks: tuple[int, ...], why: str) -> UpdateAborted | None:
    return UpdateAborted(f"ranks {list(ranks)} {why}", ranks=ranks) if ranks else None


class Failure:
    """The first error of an update on this rank, if there is one.

    :param abort: breaks the transport, so that no rank waits for an exchange that cannot finish
    """

    def __init__(self, shared: SharedAgreement, abort: Callable[[], None]) -> None:
        self._shared = shared
        self._abort = abort
        self.error: Exception | None = None

    def fail(self, error: Exception, *, alone: bool = False) -> None:
        """End the update with an error, on all ranks; ``alone``: here at once, whatever other ranks do."""
        if self.error is None:
            self.error = error
        self._break_transport(self.error)
        self._shared.fail(alone=alone)

    def conclude(self) -> None:
        """Find what ended the update, once nothing is left to agree on."""
        self.error = cause_of_end(self.error, self._shared.faults)
        if self.error is not None:
            self._break_transport(self.error)

    def _break_transport(self, cause: Exception) -> None:
        if not self._shared.outlook.begun:
            return
        try:
            self._abort()
        except Exception as error:  # noqa: BLE001 - the cause is what counts
            cause.add_note(f"the transport could not be aborted: {error!r}")
