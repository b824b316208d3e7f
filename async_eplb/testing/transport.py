"""The contract of transports as a check that every transport must pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio
import torch

from async_eplb.device import Device, device_for
from async_eplb.errors import BrokenControlGroup, BrokenTransport, BusyTransport
from async_eplb.staging import StagingBuffer, StagingPool
from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.transport.exchange import Exchange, Message, MessageGroup, Pull, Pulls
from async_eplb.weights import ExpertWeights
from async_eplb.workers import ThreadWorkers, Workers


async def check_transport(
    transport: Transport,
    *,
    device: Device | None = None,
    workers: Workers | None = None,
    seed: int = 0,
    num_exchanges: int = 5,
    timeout_s: float = 30.0,
) -> None:
    """Check that a transport keeps its contract; all ranks call this together, each with its unused transport.

    It moves messages of many sizes from live weights that change between exchanges, between all pairs of ranks, in
    several groups, and compares every byte, before and after the weights are others; runs control rounds; and checks
    that a transport is opened once and refuses work when it is closed. For transports that need grants, a control round
    grants each layer, and every other layer is pulled in turn. Other transports must find out for themselves when a
    peer has sent, and move the second hop of a row beside the first of the next.

    :param seed: of the messages, equal on all ranks
    :raises AssertionError: if the contract is broken, with what and where
    """
    device = device or device_for(torch.device("cpu"))
    workers = workers or ThreadWorkers()
    weights = _weights(transport, device)
    others = [rank for rank in range(transport.num_ranks) if rank != transport.rank]
    control = await transport.open(device, workers, weights, control_timeout_s=timeout_s, relay_peers=others)
    try:
        await transport.open(device, workers, weights, control_timeout_s=timeout_s)
    except BusyTransport:
        pass
    else:
        raise AssertionError("a transport was opened twice")
    for number in range(num_exchanges):
        if number == num_exchanges // 2:
            await control.run(CountingVoter(transport.rank, 1))  # nothing is under way on any rank
            weights = _weights(transport, device)
            await transport.rebind(weights)
        exchange, expected = _exchange(transport, device, weights, seed + number)
        if transport.launch_rule.needs_grant:
            await control.run(CountingVoter(transport.rank, 1))
        if exchange.pulls is not None and number % 2:
            exchange = replace(exchange, pulls=replace(exchange.pulls, in_turn=True))
        with device.transferring():
            pending = transport.prepare(exchange).launch()
        await pending.wait(timeout_s)
        _compare(f"exchange {number}", expected)
    if not transport.launch_rule.needs_grant:
        await _check_hops(transport, device, weights, control, seed=seed, timeout_s=timeout_s)
    await _check_rounds(transport, control, num_exchanges)
    prepared = transport.prepare(Exchange(0, ()))
    await transport.aclose()
    for what, act in (("prepared", lambda: transport.prepare(Exchange(0, ()))), ("launched", prepared.launch)):
        try:
            act()
        except BrokenTransport:
            continue
        raise AssertionError(f"a closed transport {what} an exchange")


async def _check_rounds(transport: Transport, control: ControlGroup, num_rounds: int) -> None:
    """Hold control rounds; each must bring every rank's ballot of that round."""
    voter = CountingVoter(transport.rank, num_rounds)
    await control.run(voter)
    for number, rows in enumerate(voter.rounds):
        assert rows == [[rank, number] for rank in range(transport.num_ranks)], rows  # noqa: S101
    assert len(voter.rounds) == num_rounds, f"{len(voter.rounds)} control rounds were held"  # noqa: S101


async def _check_hops(
    transport: Transport, device: Device, weights: ExpertWeights, control: ControlGroup, *, seed: int, timeout_s: float
) -> None:
    """Move a row's second hop and the next row's first at once, with equal tags; odd ranks wait in reverse order."""
    await control.run(CountingVoter(transport.rank, 1))  # all ranks have done with both rows
    (second, expected), (first, expected_first) = (_exchange(transport, device, weights, seed + n) for n in range(2))
    second = replace(second, hop=1)
    with device.transferring():
        prepared = [transport.prepare(exchange) for exchange in (second, first)]
        pending = [each.launch() for each in prepared]
    if transport.rank % 2:
        pending.reverse()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pending[0].wait, timeout_s)
        await control.run(CountingVoter(transport.rank, 1))
        await pending[1].wait(timeout_s)
    _compare("a second hop", expected)
    _compare("a first hop beside it", expected_first)


@dataclass(frozen=True, slots=True)
class _Expected:
    """The expected content of memory after an exchange, and its origin."""

    where: str
    memory: torch.Tensor
    content: torch.Tensor


def _compare(what: str, expected: list[_Expected]) -> None:
    for each in expected:
        assert torch.equal(each.memory.cpu(), each.content), f"{what}, {each.where}: bytes differ"  # noqa: S101


class CountingVoter:
    """Gives its rank and the number of the round, a set number of times."""

    def __init__(self, rank: int, num_rounds: int) -> None:
        self._rank = rank
        self._num_rounds = num_rounds
        self.rounds: list[list[list[int]]] = []

    def pause_s(self) -> float:
        """Return 0."""
        return 0.0

    def ballot(self) -> list[int]:
        """Return rank and number."""
        return [self._rank, len(self.rounds)]

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        """Record the ballots of all ranks."""
        self.rounds.append([list(row) for row in rows])
        return len(self.rounds) < self._num_rounds

    def lose(self, error: BrokenControlGroup) -> None:
        """Raise the error."""
        raise error


_SIZES = (1, 4, 4096, 1_000_003)
"""Bytes of messages, and so of the tensors of a row."""
_NUM_GROUPS = 2
_NUM_ROWS = 2
"""With two rows, the granting round of an exchange proves that all ranks are done with the row of the next."""


def _weights(transport: Transport, device: Device) -> ExpertWeights:
    """Return live weights with a slot for each peer and group: of row 0 in one block each, of others one by one."""
    num_slots = _NUM_GROUPS * transport.num_ranks
    together = [device.allocate(num_slots * size).view(num_slots, size) for size in _SIZES]
    apart = [[[device.allocate(size) for _ in range(num_slots)] for size in _SIZES] for _ in range(1, _NUM_ROWS)]
    return ExpertWeights({0: together, **dict(enumerate(apart, start=1))})


def _exchange(
    transport: Transport, device: Device, weights: ExpertWeights, seed: int
) -> tuple[Exchange, list[_Expected]]:
    """Fill a row; return an exchange in which each rank gets slots from all others, and the expected content."""
    row, num_ranks = seed % _NUM_ROWS, transport.num_ranks
    peers = [peer for peer in range(num_ranks) if peer != transport.rank]
    pulls = tuple(
        Pull(peer, transport.rank + num_ranks * number, peer + num_ranks * number)
        for number in range(_NUM_GROUPS)
        for peer in peers
        if peer in transport.one_sided_peers
    )
    staging = StagingBuffer(0, device.allocate(StagingPool.layer_nbytes(len(pulls), _SIZES)), device)
    staging.lay_out([pull.dst_slot for pull in pulls], _SIZES)
    groups, expected = [], []
    for number in range(_NUM_GROUPS):
        sends, recvs = [], []
        for peer in peers:
            slot = peer + num_ranks * number
            live = weights.slot_views(row, slot)
            one_sided = peer in transport.one_sided_peers
            written = staging.views(slot) if one_sided else [device.allocate(size) for size in _SIZES]
            for tensor, size in enumerate(_SIZES):
                with device.transferring():
                    live[tensor].copy_(_content(seed, number, transport.rank, peer, tensor, size))
                content = _content(seed, number, peer, transport.rank, tensor, size)
                where = f"from rank {peer} to {transport.rank}, group {number}, tensor {tensor}"
                expected.append(_Expected(where, written[tensor], content))
                if not one_sided:
                    tag = tensor + len(_SIZES) * number
                    sends.append(Message(peer, tag, live[tensor]))
                    recvs.append(Message(peer, tag, written[tensor]))
        groups.append(MessageGroup(tuple(sends), tuple(recvs)))
    with device.transferring():
        device.record().synchronize()
    return Exchange(row, tuple(groups), pulls=Pulls(pulls, staging) if pulls else None), expected


def _content(seed: int, group: int, src: int, dst: int, tensor: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, group, src, dst, tensor)))
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
