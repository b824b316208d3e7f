"""A transport between some ranks, and what it hands on to the transport inside."""

import torch

from async_eplb.transport import Exchange, MemoryTransport, Message, MessageGroup
from async_eplb.transport.base import PendingExchange
from async_eplb.transport.renumbered import RenumberedTransport


def test_a_group_is_prepared_and_launched_as_one_and_the_same() -> None:
    """What a transport has worked out for it is found by the group."""
    inner = MemoryTransport.world(2)[0]
    seen: list[MessageGroup] = []

    def launch(exchange: Exchange) -> PendingExchange:
        seen.extend(exchange.groups)
        return None  # type: ignore[return-value]

    inner.prepare = inner.launch = launch  # type: ignore[method-assign,assignment]
    transport = RenumberedTransport(inner, (1, 3), 4)
    message = Message(3, 0, torch.zeros(1, dtype=torch.uint8))
    exchange = Exchange(0, (MessageGroup((message,), ()), MessageGroup((), (message,))))
    transport.prepare(exchange)
    for part in exchange.parts():
        transport.launch(part)
    assert [id(group) for group in seen[:2]] == [id(group) for group in seen[2:]]
    assert [entry.peer for group in seen[:2] for entry in (*group.sends, *group.recvs)] == [1, 1]
    seen.clear()
    del exchange, part
    assert len(transport._translated) == 0
