"""A transport between some ranks: exchanges and errors are translated between ranks and places."""

import pytest
import torch

from async_eplb.errors import BrokenTransport
from async_eplb.transport import (
    Exchange,
    MemoryTransport,
    Message,
    MessageGroup,
    PendingExchange,
    PreparedExchange,
    Pull,
    Pulls,
)
from async_eplb.transport.renumbered import RenumberedTransport


class _Broken(MemoryTransport):
    """Records prepared exchanges; its launches fail."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []

    def prepare(self, exchange: Exchange) -> PreparedExchange:
        self.seen.append(exchange)
        return self

    def launch(self) -> PendingExchange:
        raise BrokenTransport("rank 1 is gone", rank=1)


def test_ranks_become_places() -> None:
    """Of messages and pulls; all else stays as it is."""
    inner = _Broken()
    message = Message(3, 5, torch.zeros(1, dtype=torch.uint8))
    pulls = Pulls((Pull(3, 2, 0),), None, in_turn=True)  # type: ignore[arg-type]
    exchange = Exchange(7, (MessageGroup((message,), ()), MessageGroup((), (message,))), hop=1, pulls=pulls)
    RenumberedTransport(inner, (1, 3), 4).prepare(exchange)
    (seen,) = inner.seen
    assert [(group.sends, group.recvs) for group in seen.groups] == [
        ((message._replace(peer=1),), ()),
        ((), (message._replace(peer=1),)),
    ]
    assert seen.pulls is not None
    assert (seen.row, seen.hop, seen.pulls.slots, seen.pulls.in_turn) == (7, 1, (Pull(1, 2, 0),), True)


def test_places_in_errors_become_ranks() -> None:
    """In the facts; the message has a note of how its own are counted."""
    prepared = RenumberedTransport(_Broken(), (1, 3), 4).prepare(Exchange(0, ()))
    with pytest.raises(BrokenTransport) as caught:
        prepared.launch()
    assert caught.value.rank == 3
    assert str(caught.value) == "rank 1 is gone (counted among ranks [1, 3])"
