"""Copies that a pull has enqueued, even if the rest failed: they are waited for, and their memory is kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from support.shared_memory import SharedMemory

from async_eplb import ExpertWeights
from async_eplb.device import DeviceEvent
from async_eplb.staging import StagingBuffer
from async_eplb.transport import Exchange, Pull, Pulls
from async_eplb.transport.copy_engine import peer_weights
from async_eplb.transport.copy_engine.cuda_ipc import Step
from async_eplb.transport.copy_engine.peer_weights import PeerWeights
from async_eplb.workers import ThreadWorkers


class End:
    """The end of copies on a device, for a test to bring about."""

    passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        assert self.passed


class LateMemory(SharedMemory):
    """Enqueues copies, as far as it can."""

    def __init__(self) -> None:
        super().__init__()
        self.last = End()
        self.last.passed = True
        self.left = 100
        self.on_stream = ""
        self.waits: list[tuple[str, DeviceEvent]] = []
        self.steps: list[Step] = []

    @contextmanager
    def transferring(self) -> Iterator[None]:
        self.on_stream = "transfer"
        yield
        self.on_stream = ""

    def wait(self, event: DeviceEvent) -> None:
        self.waits.append((self.on_stream, event))

    def copy(self, steps: Sequence[Step]) -> None:
        assert self.on_stream == "transfer"
        self.steps = [*steps]
        for _ in chain.from_iterable(step.copies.rows() for step in steps):
            if not self.left:
                raise RuntimeError("the driver takes no more")
            self.left -= 1
            self.last = End()

    def end(self) -> DeviceEvent:
        return self.last


def weights_of_two() -> tuple[LateMemory, PeerWeights, Exchange]:
    """Return memory, the mapped weights of one peer, and an exchange that pulls three slots from it."""
    memory = LateMemory()
    weights = ExpertWeights({0: [memory.allocate(32).view(4, 8)]})
    peers = PeerWeights(memory, memory, ThreadWorkers(), 0, 2)
    mine = peers.offer(weights)
    peers.map([mine, mine], within_host=False)
    peers.turns.unlink()
    staging = StagingBuffer(0, torch.empty(3 * 256, dtype=torch.uint8), memory)
    staging.lay_out(range(3), [8])
    return memory, peers, Exchange(0, (), pulls=Pulls(tuple(Pull(1, slot, slot) for slot in range(3)), staging))


def test_a_pull_ends_with_its_last_copy() -> None:
    """And nothing has to wait for what ended before."""
    memory, peers, exchange = weights_of_two()
    assert peers.end.query()
    assert peers.pull(exchange) is peers.end is memory.last
    assert not peers.end.query()


@pytest.mark.parametrize("in_turn", [False, True])
def test_peers_are_read_one_after_another(*, in_turn: bool) -> None:
    """The next rank first: all tensors of a slot, from where the peer has them; behind cells only if in turn."""
    memory = LateMemory()
    weights = ExpertWeights({0: [memory.allocate(32).view(4, 8), memory.allocate(64)[:60].view(4, 15)]})
    peers = PeerWeights(memory, memory, ThreadWorkers(), 1, 3)
    mine = peers.offer(weights)
    peers.map([mine] * 3, within_host=False)
    peers.turns.unlink()
    staging = StagingBuffer(0, torch.empty(4 * 512, dtype=torch.uint8), memory)
    staging.lay_out([5, 6, 7, 8], [8, 15])
    pulls = (Pull(0, 3, 5), Pull(2, 2, 6), Pull(0, 1, 8), Pull(2, 0, 7))
    peers.pull(Exchange(0, (), pulls=Pulls(pulls, staging, in_turn)))
    bases = [*memory.mapped]
    copies: dict[int, list[tuple[int, int, int]]] = {2: [], 0: []}
    for peer, src_slot, dst_slot in pulls:
        first, second = bases[peer : peer + 2]
        places = staging.addresses([dst_slot])[0].tolist()
        copies[peer] += [(places[0], first + 8 * src_slot, 8), (places[1], second + 15 * src_slot, 15)]
    assert [sorted(step.copies.rows()) for step in memory.steps] == [sorted(each) for each in copies.values()]
    assert [step.after is not None for step in memory.steps] == [in_turn] * 2
    assert [step.then is not None for step in memory.steps] == [in_turn] * 2


def test_a_rank_that_pulls_nothing_passes_its_turns_on() -> None:
    """Or those behind it would wait for ever."""
    memory, peers, exchange = weights_of_two()
    assert exchange.pulls is not None
    peers.pull(Exchange(0, (), pulls=Pulls((), exchange.pulls.memory, in_turn=True)))
    assert [(step.copies.number, step.then is not None) for step in memory.steps] == [(0, True)]


def test_slots_of_ranks_that_are_not_mapped_are_refused() -> None:
    """Instead of left out."""
    memory, peers, exchange = weights_of_two()
    assert exchange.pulls is not None
    with pytest.raises(RuntimeError, match=r"nothing is mapped of ranks \[2\]"):
        peers.pull(Exchange(0, (), pulls=Pulls((Pull(2, 0, 0),), exchange.pulls.memory)))
    assert memory.steps == []


def test_what_was_enqueued_before_an_error_has_an_end() -> None:
    """It writes to staging all the same."""
    memory, peers, exchange = weights_of_two()
    memory.left = 2
    with pytest.raises(RuntimeError, match="the driver takes no more"):
        peers.pull(exchange)
    assert peers.end is memory.last
    assert not peers.end.query()


def test_whoever_fills_staging_next_waits_for_pulls_that_nobody_waits_for() -> None:
    """On the device: the host may have given up on it."""
    memory, peers, exchange = weights_of_two()
    end = peers.pull(exchange)
    peers.hold_up()
    assert memory.waits == [("transfer", end)]


@pytest.mark.parametrize("passes", [True, False])
def test_what_copies_read_from_stays_mapped(monkeypatch: pytest.MonkeyPatch, *, passes: bool) -> None:
    """Even if that is for good, because the device hangs."""
    monkeypatch.setattr(peer_weights, "CLOSE_TIMEOUT_S", 0.05)
    memory, peers, exchange = weights_of_two()
    peers.pull(exchange)
    memory.last.passed = passes
    peers.close()
    assert len(memory.mapped) == (0 if passes else 1)
