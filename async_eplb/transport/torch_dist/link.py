"""The protocol of the backends of torch.distributed that move the data."""

from collections.abc import Callable
from typing import Protocol

from async_eplb.transport.exchange import Exchange

NUM_HOPS = 2
"""Connections that a backend has between two ranks: second hops wait for no first ones."""

Finish = Callable[[float], None]
"""Blocks until an exchange has finished, or raises TimeoutError at a deadline of time.monotonic()."""

Launch = Callable[[], Finish]
"""Posts a prepared exchange without waiting for any peer."""


class Link(Protocol):
    """A data communicator."""

    def prepare(self, exchange: Exchange) -> Launch:
        """Do all that can be done before the launch, with the stream of the launch current."""
        ...

    def abort(self) -> None:
        """Close all connections; exchanges under way end with an error."""
        ...
