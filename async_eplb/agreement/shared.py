"""The agreement between threads: control rounds vote with it, the serving thread passes boundaries under its lock.

Nobody waits for a peer, launches or copies while holding the lock. The control thread never calls into an event
loop: it rings a doorbell, and the loop looks at :attr:`SharedAgreement.outlook`.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from async_eplb.agreement.ballot import Ballot, Decision
from async_eplb.agreement.outlook import Outlook, PeerFaults
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode
from async_eplb.errors import BrokenControlGroup, CommitFailed, EplbError, InvalidBallot, RankInDoubt, SkippedPass
from async_eplb.workers import Doorbell, News

ACTIVE_PAUSE_S = 0.125
"""How long a rank without news puts off a round while an update runs."""
IDLE_PAUSE_S = 0.25
"""The same while none runs."""


class SharedAgreement:
    """One rank's agreement for the life of an updater, used by its control thread, serving thread and event loop."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._lock = threading.Condition()
        self._doorbell: Doorbell | None = None
        self._wake: Callable[[], None] = lambda: None
        self._alarm = math.inf
        self.in_doubt = False
        """Whether a peer may have committed waves that a round decided on which was lost, or not heeded here."""
        self.news = News()
        """Notified in the event loop when the doorbell rings."""
        self.num_rounds = 0
        self.ballots: tuple[Ballot, ...] = ()
        """Of all ranks in the last round, in the order of :attr:`Agreement.members`."""
        self.faults = PeerFaults()
        self._held: EplbError | None = None
        self.taken = 0
        """Waves of the update whose commit has begun, or will without fail: their decision is taken."""
        self.outlook = Outlook.of(self._agreement, self._held)

    def listen_with(self, doorbell: Doorbell) -> None:
        """Ring this doorbell from now on, from any thread, when there is something new."""
        self._doorbell = doorbell

    def connect(self, wake: Callable[[], None], launch_rule: LaunchRule) -> None:
        """Use a control group, whose pauses ``wake`` ends, and a transport's launch rule from now on."""
        self._wake = wake
        self._agreement.launch_rule = launch_rule

    def ring(self) -> None:
        """Wake the event loop, so that waiting tasks check their conditions."""
        if self._doorbell is not None:
            self._doorbell.ring()

    # --- Control rounds: called in their thread. ---

    def pause_s(self) -> float:
        """Return how long the next round may be put off."""
        with self._lock:
            if self._agreement.is_eager():
                return 0.0
            return ACTIVE_PAUSE_S if self._agreement.running else IDLE_PAUSE_S

    def ballot(self) -> tuple[int, ...]:
        """Return this rank's ballot; its fence holds from here on."""
        with self._lock:  # agreement rule 1: the fence is computed and installed under the lock that steps pass under
            return self._agreement.ballot().to_row()

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        """Draw the verdict of a round; return whether another follows. A rank whose row is no ballot counts as lost."""
        try:
            ballots = self._ballots(rows)
        except BrokenControlGroup as error:
            self.lose(error)
            return False
        with self._lock:
            before, promised = (self.outlook, self.faults), self._agreement.boundaries.fence > 0
            self.ballots = ballots
            try:
                verdict = self._agreement.receive(ballots)
            except EplbError as error:
                self.faults = replace(self.faults, error=error)
                verdict = self._agreement.fail_here()
            self.num_rounds += 1
            self.faults = replace(
                self.faults,
                failed=self.faults.failed or verdict.failed,
                cancelled=self.faults.cancelled or verdict.cancelled,
                waiting_for=verdict.waiting_for,
                gone=verdict.gone,
                in_doubt=self._agreement.ranks_in_doubt(ballots),
            )
            self.outlook = Outlook.of(self._agreement, self._held)
            is_news = (self.outlook, self.faults) != before or verdict.boundary > 0
            self._lock.notify_all()
        if is_news or promised or verdict.gone:
            self.ring()
        return not verdict.gone

    def lose(self, error: BrokenControlGroup) -> None:
        """Record that a rank did not answer. No control round follows."""
        with self._changing():
            self.faults = replace(self.faults, lost=error)
            self.in_doubt = self._agreement.is_in_doubt()  # agreement rule 6
            self._agreement.update.over = True
            self._lock.notify_all()
        self.ring()

    # --- The update: called in the event loop. ---

    def begin(self, mode: Mode, *, digest: int, total: int, window: int, failed: bool, generation: int = 0) -> None:
        """Begin an update; ``failed`` if this rank could not prepare for it."""
        with self._changing():
            self.taken = 0
            self.faults = PeerFaults(lost=self.faults.lost, gone=self.faults.gone, in_doubt=self.faults.in_doubt)
            self._agreement.begin(mode, digest=digest, total=total, window=window, generation=generation)
            if failed:
                self._agreement.fail()
            if self.faults.no_more_rounds:
                self._agreement.update.over = True
        self._wake()

    def end(self, *, failed: bool) -> None:
        """End the update here."""
        with self._changing():
            self._agreement.end(failed=failed)

    def count(self, *, staged: int = 0, finished: int = 0) -> None:
        """Count waves that are staged here, or whose commit is done on the device here."""
        with self._lock:
            self._agreement.update.staged += staged
            self._agreement.update.finished += finished
            is_eager = self._agreement.is_eager()
        if is_eager:
            self._wake()

    def offer(self, parts: int) -> None:
        """Count one more wave that can be launched here, in so many parts."""
        with self._lock:
            self._agreement.update.parts = (*self._agreement.update.parts, parts)
        self._wake()

    def cancel(self) -> None:
        """Ask all ranks to end the update at the same wave."""
        with self._lock:
            self._agreement.cancel()
        self._wake()

    def fail(self, *, alone: bool = False) -> None:
        """Give FAILED in all ballots from now on; ``alone``: the update is over here before the others know."""
        with self._changing():
            self._agreement.fail()
            if alone:  # agreement rule 6: the round that is under way may decide, and is not heeded here
                self.in_doubt = self.in_doubt or self._agreement.is_in_doubt()
                self._agreement.update.over = True
        self._wake()
        self.ring()

    def give_up(self) -> None:
        """End the update in the next round, because a rank does not begin it."""
        with self._lock:
            self._agreement.give_up()
        self._wake()

    def leave(self) -> None:
        """Make the next round the last."""
        with self._lock:
            self._agreement.leave()
        self._wake()

    def hold(self, error: EplbError, *, before: float = math.inf) -> bool:
        """Raise ``error`` at every boundary from now on, until a recovery.

        :param before: not if the commit of this wave has begun; else it never begins
        :returns: whether it was done
        """
        with self._changing():
            if self.taken > before:
                return False
            if self._held is None or isinstance(error, CommitFailed):
                self._held = error
            self._agreement.doubt()
            self._lock.notify_all()
            return True

    def restart(self, members: Sequence[int], *, generation: int, step: int) -> None:
        """Go on with the remaining ranks, as after opening; no control rounds run meanwhile."""
        with self._changing():
            self._agreement.restart(members, generation=generation, step=step)
            self._alarm = math.inf
            self.in_doubt = False
            self._held = None
            self.faults = PeerFaults()
        self.ring()

    def set_standing(self, *, standing: bool) -> None:
        """Record that this rank makes no steps from now on, or makes them again."""
        with self._changing():
            self._agreement.boundaries.standing = standing
        self.ring()

    def due_while_standing(self, *, for_good: bool) -> Decision | None:
        """Return what is due before the next boundary, or ``for_good`` at any boundary to come."""
        with self._lock:
            boundaries = self._agreement.boundaries
            if not boundaries.standing or self._held is not None:
                return None
            return self._take(boundaries.due_ever() if for_good else boundaries.due_next())

    def demand(self, number: int) -> None:
        """Ask all ranks for their rebalance of this number, counted from 1."""
        with self._changing():
            self._agreement.demanded = max(self._agreement.demanded, number)
        self._wake()
        self.ring()

    def behind(self, staged: int) -> tuple[int, ...]:
        """Return the ranks that had not staged so many waves in the last round."""
        return self._agreement.named(place for place, ballot in enumerate(self.ballots) if ballot.staged < staged)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return once ``holds`` does; it is looked at now and after each ring."""
        await self.news.until(holds)

    async def until_step(self, number: int, *, unless: Callable[[], bool]) -> None:
        """Return when boundary ``number`` has been passed, or ``unless`` holds when there is something new."""
        while self.outlook.step < number and not unless():
            self._ring_at(number)
            await self.news.until_notified()

    # --- Step boundaries: called in the serving thread. ---

    def may_pass(self, number: int = 0) -> bool:
        """Return whether a boundary can be passed, or never will be; without its number, the next one."""
        return self._agreement.boundaries.may_pass(number) or self.faults.lost is not None or self._held is not None

    def try_pass(self, number: int) -> tuple[bool, Decision | None]:
        """Pass a boundary unless a fence stands there; return whether it was passed, and what is due.

        A number that was passed before passes nothing. It, or one that is not the next, ends the running update.

        :param number: of the boundary, as the engine counts; 0 for the next one
        :raises RankInDoubt: if a peer may have committed waves, and it will never be known here
        :raises CommitFailed: if a wave's copies failed on this rank only
        """
        with self._changing():
            boundaries = self._agreement.boundaries
            self._require_no_doubt(number)
            if not boundaries.may_pass(number):
                return False, None
            under_way = self._agreement.running and not self._agreement.update.over
            skipped = under_way and number not in {0, boundaries.step + 1}
            if skipped:
                self._skip(number)
            repeated = 0 < number <= boundaries.step
            decision = None if repeated else self._take(boundaries.pass_next(number))
            alarm = boundaries.step >= self._alarm
            if alarm:
                self._alarm = math.inf
        if skipped:
            self._wake()
        if alarm or skipped:
            self.ring()
        return True, decision

    def waited(self) -> None:
        """Make the lead larger, because a step had to wait at its fence."""
        with self._changing():
            self._agreement.lead.waited()

    def wait_for_result(self, number: int) -> None:
        """Block until a boundary may be passed or never will be; this ends, for a round has a deadline."""
        with self._lock:
            self._lock.wait_for(lambda: self.may_pass(number))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Lock the agreement for the body, and then publish what it changed as the outlook."""
        with self._lock:
            try:
                yield
            finally:
                self.outlook = Outlook.of(self._agreement, self._held)

    def _ring_at(self, step: int) -> None:
        """Ring when this boundary is passed; whoever waits for a later one then asks anew."""
        with self._lock:
            passed = self._agreement.boundaries.step >= step
            self._alarm = self._alarm if passed else min(self._alarm, step)
        if passed:
            self.ring()

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
            self.taken = decision.copied
        return decision

    def _require_no_doubt(self, number: int) -> None:
        # Agreement rule 6: behind a fence whose round was lost, a peer may have committed.
        boundaries, lost = self._agreement.boundaries, self.faults.lost
        if self._held is not None:
            raise self._held
        at_once = self.in_doubt and not boundaries.fence
        if lost is not None and (at_once or not boundaries.may_pass(number)):
            boundary = boundaries.fence or boundaries.step + 1
            raise RankInDoubt(
                f"boundary {boundary} cannot be passed: the control round that decides whether layers are committed "
                f"there was lost, and a peer may have committed them ({lost}); recover() finds out",
                step=boundaries.step,
                boundary=boundary,
                missing=lost.missing,
            ) from lost

    def _skip(self, number: int) -> None:
        """End the update, because the engine's next pass is not the one after the last."""
        step = self._agreement.boundaries.step
        error = SkippedPass(
            f"step({number}) after boundary {step}: every rank passes every boundary once, in order, and an engine "
            "that numbers them does so before its first update",
            steps=(step, number),
        )
        self.faults = replace(self.faults, error=self.faults.error or error)
        self._agreement.fail()
