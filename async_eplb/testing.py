"""What users' tests and ours share: worlds of processes, a transport's conformance, stages of a set duration."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import anyio
import torch

from async_eplb.device import Device, device_for
from async_eplb.errors import BrokenControlGroup, BrokenTransport, BusyTransport
from async_eplb.launch import World, WorldRank, run_world
from async_eplb.transport.base import Exchange, Message, MessageGroup, Transport
from async_eplb.workers import Doorbell, LoopDoorbell, ThreadWorkers, Workers

__all__ = ["ScheduledWorkers", "World", "WorldRank", "check_transport", "run_world"]

T = TypeVar("T")


class ScheduledWorkers:
    """Workers without threads: work is done at once, then takes a set time on the event loop's clock.

    Under a virtual clock this makes runs that take no real time and are the same every time.

    :param durations_s: kind of work → seconds; zero for kinds that are not named
    """

    def __init__(self, durations_s: Mapping[str, float] | None = None) -> None:
        self._durations_s = durations_s or {}
        self._turns: dict[str, anyio.Lock] = {}

    async def run(self, kind: str, function: Callable[[], T]) -> T:
        """Run ``function`` and let its time pass, one of a kind at a time."""
        async with self._turns.setdefault(kind, anyio.Lock()):
            result = function()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(self._durations_s.get(kind, 0.0))
            return result

    def doorbell(self) -> Doorbell:
        """Return a doorbell inside the event loop."""
        return LoopDoorbell()


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

    It moves messages of many sizes between all pairs of ranks, in several groups, and compares every byte; holds
    control rounds; and checks that a transport is opened once and refuses work when it is not open.

    :param seed: of the messages, equal on all ranks
    :raises AssertionError: if the contract is broken, with what and where
    """
    device = device or device_for(torch.device("cpu"))
    workers = workers or ThreadWorkers()
    control = await transport.open(device, workers, control_timeout_s=timeout_s)
    try:
        await transport.open(device, workers, control_timeout_s=timeout_s)
    except BusyTransport:
        pass
    else:
        raise AssertionError("a transport was opened twice")
    for number in range(num_exchanges):
        exchange, expected = _exchange(transport, device, seed + number)
        with device.transferring():
            pending = transport.launch(exchange)
        await pending.wait(timeout_s)
        for group, contents in zip(exchange.groups, expected, strict=True):
            for message, content in zip(group.recvs, contents, strict=True):
                where = f"exchange {number}, from rank {message.peer} to {transport.rank}, tag {message.tag}"
                assert torch.equal(message.data.cpu(), content), f"{where}: bytes differ"  # noqa: S101
    voter = _CountingVoter(transport.rank, num_exchanges)
    await control.run(voter)
    for number, rows in enumerate(voter.rounds):
        assert rows == [[rank, number] for rank in range(transport.num_ranks)], rows  # noqa: S101
    assert len(voter.rounds) == num_exchanges, f"{len(voter.rounds)} control rounds were held"  # noqa: S101
    await transport.aclose()
    try:
        transport.launch(Exchange(0, ()))
    except BrokenTransport:
        return
    raise AssertionError("a closed transport took an exchange")


class _CountingVoter:
    """Gives its rank and the number of the round, a set number of times."""

    def __init__(self, rank: int, num_rounds: int) -> None:
        self._rank = rank
        self._num_rounds = num_rounds
        self.rounds: list[list[list[int]]] = []

    def pause_s(self) -> float:
        return 0.0

    def ballot(self) -> list[int]:
        return [self._rank, len(self.rounds)]

    def receive(self, rows: Sequence[Sequence[int]]) -> bool:
        self.rounds.append([list(row) for row in rows])
        return len(self.rounds) < self._num_rounds

    def lose(self, error: BrokenControlGroup) -> None:
        raise error


def _exchange(transport: Transport, device: Device, seed: int) -> tuple[Exchange, list[list[torch.Tensor]]]:
    """Return an exchange in which all ranks send to all others, and what each receive must contain."""
    sizes = (1, 4, 4096, 1_000_003)
    groups, expected = [], []
    for number in range(2):
        sends, recvs, contents = [], [], []
        for peer in range(transport.num_ranks):
            if peer == transport.rank:
                continue
            for tag, size in enumerate(sizes):
                sent = _content(seed, number, transport.rank, peer, tag, size).to(device.torch_device)
                sends.append(Message(peer, tag + len(sizes) * number, sent))
                contents.append(_content(seed, number, peer, transport.rank, tag, size))
                recvs.append(Message(peer, tag + len(sizes) * number, device.allocate(size)))
        groups.append(MessageGroup(tuple(sends), tuple(recvs)))
        expected.append(contents)
    return Exchange(seed, tuple(groups)), expected


def _content(seed: int, group: int, src: int, dst: int, tag: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, group, src, dst, tag)))
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
