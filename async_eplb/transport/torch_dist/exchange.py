"""Exchanges over a link: prepared, launched, waited for, and never taken for finished once the link was aborted."""

import time
from functools import partial

from async_eplb.errors import BrokenTransport, TransferTimeout
from async_eplb.transport.base import PendingExchange, PreparedExchange
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.torch_dist.link import Finish, Launch, Link
from async_eplb.workers import Interruptible, Work, Workers


class OpenLink:
    """A link with its state.

    :param rank: of this process in the EP group, for errors
    :param workers: whose threads wait for exchanges
    """

    def __init__(self, link: Link, rank: int, workers: Workers) -> None:
        self.rank = rank
        self.workers = workers
        self._link: Link | None = link

    @property
    def is_open(self) -> bool:
        """Whether it was neither closed nor aborted. Already false while an abort is under way."""
        return self._link is not None

    def require_open(self, row: int) -> Link:
        """Return the link.

        :param row: of the exchange that needs it
        :raises BrokenTransport: if it was aborted or closed
        """
        link = self._link
        if link is None:
            raise BrokenTransport(f"rank {self.rank}, row {row}: the transport was aborted or closed", rank=self.rank)
        return link

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        """Prepare an exchange.

        :raises BrokenTransport: if the link was aborted or closed
        """
        return _Prepared(self, exchange, self.require_open(exchange.row).prepare(exchange))

    def abort(self) -> None:
        """Close all connections; exchanges under way end with an error."""
        link, self._link = self._link, None
        if link is not None:  # from here on nobody takes for an arrival what the abort ends
            link.abort()

    def close(self) -> None:
        """Forget the link, which closes its connections once no exchange has them."""
        self._link = None


class _Prepared:
    def __init__(self, link: OpenLink, exchange: Exchange, launch: Launch) -> None:
        self._link = link
        self._row = exchange.row
        self._kind = Work.RELAY if exchange.hop else Work.EXCHANGE
        self._launch: Launch | None = launch

    def launch(self) -> PendingExchange:
        self._link.require_open(self._row)
        launch, self._launch = self._launch, None
        if launch is None:
            raise RuntimeError(f"the exchange of row {self._row} was launched before")
        try:
            finish = launch()
        except RuntimeError as error:  # NCCL has noticed that a peer is gone
            rank = self._link.rank
            raise BrokenTransport(f"rank {rank}, row {self._row}: {error}", rank=rank) from error
        return _Pending(self._link, self._row, self._kind, finish)


class _Pending:
    def __init__(self, link: OpenLink, row: int, kind: str, finish: Finish) -> None:
        self._link = link
        self._row = row
        self._kind = kind
        self._finish = finish

    async def start(self) -> None:
        pass

    async def wait(self, timeout_s: float) -> None:
        link, rank = self._link, self._link.rank
        link.require_open(self._row)
        deadline = time.monotonic() + timeout_s
        try:
            await link.workers.run(self._kind, Interruptible(partial(self._finish, deadline), link.abort))
        except (RuntimeError, TimeoutError) as error:
            link.abort()
            where = f"rank {rank}, row {self._row}"
            if time.monotonic() >= deadline:
                raise TransferTimeout(
                    f"{where}: the exchange did not finish within {timeout_s} s ({error})",
                    rank=rank,
                    layer=self._row,
                    timeout_s=timeout_s,
                ) from error
            raise BrokenTransport(f"{where}: {error}", rank=rank) from error
        link.require_open(self._row)
