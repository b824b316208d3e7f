"""What a backend of torch.distributed does for the transport."""

from collections.abc import Callable
from typing import Protocol

from async_eplb.transport.base import Exchange
from async_eplb.workers import Workers

NUM_HOPS = 2
"""Connections that a backend has between two ranks: second hops wait for no first ones."""

Finish = Callable[[float], None]
"""Blocks until an exchange has finished, or raises TimeoutError at a deadline of time.monotonic()."""


class Link(Protocol):
    """A data communicator."""

    workers: Workers

    def launch(self, exchange: Exchange) -> Finish:
        """Post an exchange without waiting for any peer."""
        ...

    def abort(self) -> None:
        """Close all connections; what is under way ends with an error."""
        ...
