"""The agreement between threads: control rounds vote with it, the serving thread passes boundaries under its lock.

Nobody waits for a peer, launches or copies while holding the lock. The control thread never calls into an event
loop: it rings a doorbell, and the loop looks.
"""

import math
import threading
from collections.abc import Callable, Sequence

from async_eplb.agreement.ballot import Ballot, Decision, Verdict
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import BrokenControlGroup, CommitFailed, EplbError, InvalidBallot, RankInDoubt, StepMismatch
from async_eplb.workers import News

ACTIVE_PAUSE_S = 0.125
"""How long a rank without news puts off a round while an update runs."""
IDLE_PAUSE_S = 0.25
"""The same while none runs."""


class Driver:
    """One rank's part in control rounds, for the life of an updater.

    :param ring: wakes the event loop that runs updates, from any thread
    """

    def __init__(self, agreement: Agreement, ring: Callable[[], None]) -> None:
        self._agreement = agreement
        self._ring = ring
        self._lock = threading.Condition()
        self._wake: Callable[[], None] = lambda: None
        self._numbered = False
        self._alarm = math.inf
        self.num_rounds = 0
        self.ballots: tuple[Ballot, ...] = ()
        """What all ranks said in the last round, in the order of :attr:`Agreement.members`."""
        self.lost: BrokenControlGroup | None = None
        """Why there are no more rounds, if a rank did not answer."""
        self.in_doubt = False
        """Whether a peer may have committed layers that the lost round decided on."""
        self.held: EplbError | None = None
        """Why this rank must not serve before it recovers."""
        self.taken = 0
        """Layers of the update whose commit has begun, or will without fail: who does it has its decision."""
        self.left: tuple[int, ...] = ()
        """Ranks that have closed, after which there are no more rounds."""
        self.error: EplbError | None = None
        """What this rank found wrong in the ballots of the running update."""
        self.failed_by: tuple[int, ...] = ()
        self.cancelled_by: tuple[int, ...] = ()
        self.waiting_for: tuple[int, ...] = ()

    def connect(self, wake: Callable[[], None], launch_rule: LaunchRule) -> None:
        """Say how to end a pause of the control rounds, and when transfers may begin."""
        self._wake = wake
        self._agreement.launch_rule = launch_rule

    # --- Control rounds: called in their thread. ---

    def pause_s(self) -> float:
        """Return how long the next round may be put off."""
        with self._lock:
            if self._agreement.is_eager():
                return 0.0
            return ACTIVE_PAUSE_S if self._agreement.running else IDLE_PAUSE_S

    def ballot(self) -> tuple[int, ...]:
        """Return this rank's ballot; its fence holds from here on."""
        with self._lock:
            return self._agreement.ballot().to_row()

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        """Take in a round; return whether another follows. A rank that gives no ballot is as good as lost."""
        try:
            ballots = self._ballots(rows)
        except BrokenControlGroup as error:
            self.lose(error)
            return False
        with self._lock:
            before, promised = self._outlook(), self._agreement.fence > 0
            self.ballots = ballots
            try:
                verdict = self._agreement.receive(self.ballots)
            except EplbError as error:
                self.error = error
                self._agreement.over = True
                verdict = Verdict(over=True)
            self.num_rounds += 1
            self.failed_by = self.failed_by or verdict.failed
            self.cancelled_by = self.cancelled_by or verdict.cancelled
            self.waiting_for = verdict.waiting_for
            self.left = verdict.left
            is_news = self._outlook() != before or verdict.boundary > 0
            self._lock.notify_all()
        if is_news or promised or self.left:
            self._ring()
        return not self.left

    def _outlook(self) -> tuple[int, ...]:
        """Return what tasks of the event loop wait for, as far as rounds decide it."""
        agreement = self._agreement
        return (
            agreement.agreed,
            agreement.launched,
            agreement.limit,
            agreement.begun,
            agreement.over,
            agreement.demanded,
        )

    def lose(self, error: BrokenControlGroup) -> None:
        """Take in that a rank did not answer."""
        with self._lock:
            self.lost = error
            self.in_doubt = self._agreement.is_in_doubt()
            self._agreement.over = True
            self._lock.notify_all()
        self._ring()

    def hold(self, error: EplbError) -> None:
        """Pass no boundary from here on; the layer that could not be copied last is the one that is torn."""
        with self._lock:
            self._hold(error)

    def hold_before(self, index: int, error: EplbError) -> bool:
        """Hold, unless the layer's commit is taken; return whether this rank is held, so that nobody ever takes it."""
        with self._lock:
            if self.taken > index:
                return False
            self._hold(error)
            return True

    def restart(self, members: Sequence[int], *, generation: int, step: int) -> None:
        """Forget all that went wrong and go on with the ranks that are left; no rounds are held meanwhile."""
        with self._lock:
            self._agreement.restart(members, generation=generation, step=step)
            self._numbered = False
            self._alarm = math.inf
            self.lost = self.held = self.error = None
            self.in_doubt = False
            self.left = self.failed_by = self.cancelled_by = self.waiting_for = ()
        self._ring()

    # --- The update: called in the event loop. ---

    def begin(self, mode: Mode, *, digest: int, total: int, window: int, failed: bool) -> None:
        """Begin an update; ``failed`` if this rank could not prepare for it."""
        with self._lock:
            self.error = None
            self.taken = 0
            self.failed_by = self.cancelled_by = self.waiting_for = ()
            self._agreement.begin(mode, digest=digest, total=total, window=window)
            if failed:
                self._agreement.fail()
            if self.lost or self.left:
                self._agreement.over = True
        self._wake()

    def end(self, *, broken: bool) -> None:
        """End the update here."""
        with self._lock:
            self._agreement.end(broken=broken)

    def advance(self, *, staged: int = 0, committed: int = 0) -> None:
        """Count layers."""
        with self._lock:
            self._agreement.staged += staged
            self._agreement.committed += committed
            is_eager = self._agreement.is_eager()
        if is_eager:
            self._wake()

    def offer(self, parts: int) -> None:
        """Say that one more layer can be launched here, in so many parts."""
        with self._lock:
            self._agreement.parts = (*self._agreement.parts, parts)
        self._wake()

    def cancel(self) -> None:
        """Ask all ranks to end the update at the same layer."""
        with self._lock:
            self._agreement.cancel()
        self._wake()

    def fail(self, *, alone: bool = False) -> None:
        """Tell all ranks that this one cannot go on; ``alone``: do not wait until they have heard it."""
        with self._lock:
            self._agreement.fail()
            if alone:
                self._agreement.over = True
        self._wake()
        self._ring()

    def leave(self) -> None:
        """Make the next round the last."""
        with self._lock:
            self._agreement.leave()
        self._wake()

    def stand(self, *, standing: bool) -> None:
        """Say whether this rank makes no steps at present."""
        with self._lock:
            self._agreement.standing = standing
        self._ring()

    def due_while_standing(self, *, for_good: bool) -> Decision | None:
        """Return what is due before the next boundary, or ``for_good`` at any boundary to come."""
        with self._lock:
            if not self._agreement.standing or self.held is not None:
                return None
            return self._take(self._agreement.drain() if for_good else self._agreement.stand())

    def demand(self, number: int) -> None:
        """Ask all ranks for their rebalance of this number, counted from 1."""
        with self._lock:
            self._agreement.demanded = max(self._agreement.demanded, number)
        self._wake()
        self._ring()

    def behind(self, staged: int) -> tuple[int, ...]:
        """Return the ranks that had not staged so many layers in the last round."""
        return self._agreement.named(place for place, ballot in enumerate(self.ballots) if ballot.staged < staged)

    @property
    def demanded(self) -> int:
        """Rebalances that some rank has demanded."""
        return self._agreement.demanded

    @property
    def standing(self) -> bool:
        """Whether this rank makes no steps at present."""
        return self._agreement.standing

    @property
    def generation(self) -> int:
        """Updates begun."""
        return self._agreement.generation

    @property
    def begun(self) -> bool:
        """Whether all ranks have begun the update with equal inputs."""
        return self._agreement.begun

    @property
    def over(self) -> bool:
        """Whether nothing is left to agree on."""
        return self._agreement.over

    @property
    def limit(self) -> int:
        """Layers of the update, fewer after a cancellation."""
        return self._agreement.limit

    @property
    def agreed(self) -> int:
        """Layers that are staged everywhere."""
        return self._agreement.agreed

    @property
    def launched(self) -> int:
        """Layers whose launch is agreed."""
        return self._agreement.launched

    # --- Step boundaries: called in the serving thread. ---

    @property
    def step(self) -> int:
        """Boundaries passed."""
        return self._agreement.step

    @property
    def lead(self) -> int:
        """Boundaries from the last one passed to a new fence."""
        return self._agreement.lead

    def may_pass(self) -> bool:
        """Whether the next boundary can be passed, or never will be."""
        return self._agreement.may_pass() or self.lost is not None or self.held is not None

    def try_pass(self, number: int | None) -> tuple[bool, Decision | None]:
        """Pass the next boundary unless a fence stands there; return whether it was passed, and what is due.

        :param number: of the boundary, as the engine counts
        :raises StepMismatch: if ``number`` is not that of the next boundary
        :raises RankInDoubt: if a peer may have committed layers, and it will never be known here
        :raises CommitFailed: if a layer's copies failed on this rank only
        """
        with self._lock:
            agreement = self._agreement
            if number is not None:
                self._require_next(number)
            self._require_no_doubt()
            if not agreement.may_pass():
                return False, None
            decision = self._take(agreement.pass_boundary())
            alarm = agreement.step >= self._alarm
            if alarm:
                self._alarm = math.inf
        if alarm:
            self._ring()
        return True, decision

    def ring_at(self, step: int) -> None:
        """Ring the loop when this boundary is passed; who asked for a later one then asks anew."""
        with self._lock:
            passed = self._agreement.step >= step
            self._alarm = self._alarm if passed else min(self._alarm, step)
        if passed:
            self._ring()

    def waited(self) -> None:
        """Say that a step had to wait at its fence."""
        with self._lock:
            self._agreement.waited()

    def wait_for_result(self) -> None:
        """Block the calling thread until the next boundary may be passed or never will be.

        This ends: a control round has a deadline of its own.
        """
        with self._lock:
            self._lock.wait_for(self.may_pass)

    def _ballots(self, rows: Sequence[Sequence[int]]) -> tuple[Ballot, ...]:
        ballots = []
        for place, row in enumerate(rows):
            try:
                ballots.append(Ballot.from_row(row))
            except InvalidBallot as error:
                raise BrokenControlGroup(str(error), missing=self._agreement.named([place])) from error
        return tuple(ballots)

    def _take(self, decision: Decision | None) -> Decision | None:
        if decision is not None:
            self.taken = decision.committed
        return decision

    def _hold(self, error: EplbError) -> None:
        if self.held is None or isinstance(error, CommitFailed):
            self.held = error
        self._lock.notify_all()

    def _require_no_doubt(self) -> None:
        agreement = self._agreement
        if self.held is not None:
            raise self.held
        at_once = self.in_doubt and not agreement.fence
        if self.lost is not None and (at_once or not agreement.may_pass()):
            boundary = agreement.fence or agreement.step + 1
            raise RankInDoubt(
                f"boundary {boundary} cannot be passed: the control round that decides whether layers are committed "
                f"there was lost, and a peer may have committed them ({self.lost}); recover() finds out",
                step=agreement.step,
                boundary=boundary,
                missing=self.lost.missing,
            ) from self.lost

    def _require_next(self, number: int) -> None:
        agreement = self._agreement
        untouched = agreement.step == agreement.fence == agreement.last_boundary == 0
        if not self._numbered and untouched:
            agreement.step = number - 1
        self._numbered = True
        if number != agreement.step + 1:
            raise StepMismatch(
                f"step({number}) after {agreement.step} boundaries: every rank passes every boundary, in order, and an "
                "engine that numbers them begins before the first update",
                steps=(agreement.step, number),
            )


async def until_step(driver: Driver, news: News, number: int, *, unless: Callable[[], bool]) -> None:
    """Return when boundary ``number`` has been passed, or ``unless`` holds after any news."""
    while driver.step < number and not unless():
        driver.ring_at(number)
        await news.until_notified()
