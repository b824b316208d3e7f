"""The first of several transports that all ranks can open."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from anyio import CancelScope, create_task_group

from async_eplb.agreement.rules import LaunchRule
from async_eplb.device import Device
from async_eplb.errors import (
    BusyGroup,
    BusyTransport,
    EplbError,
    InvalidGroup,
    InvalidOptions,
    NoUsableTransport,
    OpenTimeout,
    UpdaterMismatch,
)
from async_eplb.groups import Board
from async_eplb.transport.base import OPEN_TIMEOUT_S, ControlGroup, PreparedExchange, Transport
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.identity import Identity
from async_eplb.transport.meeting import meet, texts_at
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Work, Workers


def open_first_usable(transports: Sequence[Transport]) -> "FirstUsable":
    """Return a transport that opens the first of these which all ranks can open, as that one.

    ``ExpertUpdater(..., transport=open_first_usable([CopyEngineTransport(), TorchDistTransport()]))``: all ranks take
    the same one, and close those before it. :attr:`FirstUsable.refusals` says why these were not taken.

    :param transports: unused ones of one group, in order of preference, the same on all ranks
    :raises InvalidOptions: if there are none
    """
    return FirstUsable(transports)


class FirstUsable:
    """One of several transports, chosen when it is opened. Until then it stands for the first of them.

    :param candidates: unused ones of one group, in order of preference
    :raises InvalidOptions: if there are none
    """

    def __init__(self, candidates: Sequence[Transport]) -> None:
        if not candidates:
            raise InvalidOptions("there is no transport to choose; give at least one", option="transports")
        self._candidates = tuple(candidates)
        self._chosen = self._candidates[0]
        self._own: Transport | None = None
        """The one that this has opened, wholly or not, and must close."""
        self._is_used = False
        self.board: Board = self._chosen.board
        self.run_id = self._chosen.run_id
        self.refusals: tuple[str, ...] = ()
        """Why each candidate before the chosen one was not taken, in the words of the ranks that could not open it."""

    def __repr__(self) -> str:
        return f"<FirstUsable: {self._chosen!r}>"

    @property
    def launch_rule(self) -> LaunchRule:
        """The chosen one's."""
        return self._chosen.launch_rule

    @property
    def one_sided_peers(self) -> Collection[int]:
        """The chosen one's."""
        return self._chosen.one_sided_peers

    @property
    def rank(self) -> int:
        """This process in the EP group."""
        return self.board.rank

    @property
    def num_ranks(self) -> int:
        """Processes of the EP group."""
        return self.board.num_ranks

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        identity: Identity | None = None,
        relay_peers: Collection[int] = (),
    ) -> ControlGroup:
        """Try one candidate after another, with all ranks.

        :raises NoUsableTransport: if none can be opened on all ranks, with the reasons
        """
        if self._is_used:
            raise BusyTransport(f"{self!r} was opened before; make one transport for each updater")
        self._is_used = True
        patience_s = open_timeout_s + 2 * control_timeout_s  # others may be connecting, with these deadlines
        for number, candidate in enumerate(self._candidates):
            what, self._chosen, self._own = f"candidate {number}", candidate, candidate
            open_it = partial(
                candidate.open,
                device,
                workers,
                weights,
                control_timeout_s=control_timeout_s,
                open_timeout_s=open_timeout_s,
                identity=identity,
                relay_peers=relay_peers,
            )
            control, reason = await self._try(open_it, what, workers)
            reasons = await meet(workers, self.board, what, reason, timeout_s=patience_s)
            if control is not None and not any(reasons):
                return control
            told = {text: [rank for rank, each in enumerate(reasons) if each == text] for text in reasons if text}
            words = "; ".join(f"ranks {ranks}: {text}" for text, ranks in told.items())
            self.refusals += (f"{type(candidate).__name__}: {words}",)
            await self.aclose()
        raise NoUsableTransport(
            f"rank {self.rank}: none of {len(self._candidates)} transports can be opened on all ranks: "
            + " | ".join(self.refusals),
            refusals=self.refusals,
        )

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange over the chosen one."""
        return self._chosen.prepare(exchange)

    async def rebind(self, weights: ExpertWeights) -> None:
        """Have the chosen one take other live weights."""
        await self._chosen.rebind(weights)

    def replacement(self, number: int) -> Transport:
        """Return the chosen one's: what it can do is known."""
        return self._chosen.replacement(number)

    def abort(self) -> None:
        """Abort the chosen one."""
        self._chosen.abort()

    async def aclose(self) -> None:
        """Close the chosen one."""
        own, self._own = self._own, None
        if own is not None:
            await own.aclose()

    async def _try(
        self, open_it: Callable[[], Awaitable[ControlGroup]], what: str, workers: Workers
    ) -> tuple[ControlGroup | None, str]:
        """Open a candidate, or give it up as soon as another rank has; return its control group, or why there is none.

        :raises UpdaterMismatch: if ranks open it for different updaters, which no other candidate would mend
        :raises BusyGroup: if such an updater is open already
        :raises OpenTimeout: if a rank does not come
        """
        control, reason, failed = None, "given up with the others", f"{what} failed"
        hopeless: EplbError | None = None
        async with create_task_group() as tasks:
            tasks.start_soon(self._watch, failed, workers, tasks.cancel_scope)
            try:
                control, reason = await open_it(), ""
            except (UpdaterMismatch, BusyGroup, OpenTimeout) as error:
                hopeless = error
            except Exception as error:  # noqa: BLE001 - whatever it is, the next candidate may work
                reason = f"{type(error).__name__}: {error}"
                if isinstance(error, BusyTransport):  # somebody else has it open
                    self._own = None
                await workers.run(Work.CONNECT, partial(self.board.put, failed, reason))
            tasks.cancel_scope.cancel()
        if hopeless is not None:
            raise hopeless
        return control, reason

    async def _watch(self, failed: str, workers: Workers, opening: CancelScope) -> None:
        """Cancel the opening when a rank has said that its own failed."""
        with suppress(InvalidGroup):  # if the store is gone, the meeting says so
            await texts_at(workers, self.board, [failed])
            opening.cancel()
