"""An NCCL link packs and posts messages, and asks NCCL for errors of works that are done."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.updates import examples

from async_eplb import ExpertWeights
from async_eplb.device import CpuDevice
from async_eplb.transport import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.nccl import NcclLink
from async_eplb.transport.torch_dist.packing import PACKED_NBYTES, Packer, pack, packed_nbytes

ROOM = 1 << 18
"""Bytes that are packed for a peer at most."""
SIZES = st.sampled_from([1, 4096, 1 << 17, 1 << 18, 1 << 20])
ENDS = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda ends: ends[0] != ends[1])


@given(st.lists(st.tuples(ENDS, SIZES), max_size=40), st.randoms(use_true_random=False))
def test_both_sides_pack_alike(messages: list[tuple[tuple[int, int], int]], random: Random) -> None:
    """Whatever order each side lists them in, a pair posts the same packs, and all others whole."""
    sent, received = (
        {
            (peer, me): (whole, packs)
            for me in range(4)
            for peer in range(4)
            for whole, packs in [_of(me, peer, messages, side, random)]
        }
        for side in (0, 1)
    )
    for (dst, src), (whole, packs) in sent.items():
        there_whole, there_packs = received[src, dst]
        assert packs == there_packs
        assert sorted(whole) == sorted(there_whole)
        assert len(packs) <= 1
        assert all(len(tags) > 1 for tags in packs)
        assert all(sum(messages[tag][1] for tag in tags) <= ROOM for tags in packs)
        listed = [tag for tag, (ends, _) in enumerate(messages) if ends == (src, dst)]
        assert sorted([*whole, *(tag for tags in packs for tag in tags)]) == listed


def _of(
    me: int, peer: int, messages: list[tuple[tuple[int, int], int]], side: int, random: Random
) -> tuple[list[int], list[list[int]]]:
    """Return the tags of what one rank posts for one peer, whole and packed."""
    mine = [
        Message(ends[1 - side], tag, torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        for tag, (ends, nbytes) in enumerate(messages)
        if ends[side] == me
    ]
    random.shuffle(mine)
    whole, packs = pack(mine, ROOM)
    return (
        [message.tag for message in whole if message.peer == peer],
        [[message.tag for message in small] for small in packs if small[0].peer == peer],
    )


def test_what_is_packed_is_in_its_peers_place() -> None:
    """A pack for each peer, in scratch memory that all groups share; what has no room there is posted as it is."""
    scratch = torch.empty(2, 5, 2 * 112, dtype=torch.uint8)
    packer = Packer(scratch, {peer: peer for peer in range(5)})
    for num_peers in (2, 5, 1):
        messages = tuple(
            Message(peer, tag, torch.zeros(100, dtype=torch.uint8)) for peer in range(num_peers) for tag in range(3)
        )
        posts = packer.posts(MessageGroup(messages, messages[:6]))
        for side, mine, posted, pairs in (
            (scratch[0], messages, posts.sends, posts.packing),
            (scratch[1], messages[:6], posts.recvs, posts.unpacking),
        ):
            packed = [message for message in mine if message.tag < 2]
            assert [data for _, data in pairs] == [message.data for message in packed]
            places = [side[message.peer, 112 * message.tag :] for message in packed]
            assert [at.data_ptr() for at, _ in pairs] == [place.data_ptr() for place in places]
            whole, together = posted[: len(mine) - len(packed)], posted[len(mine) - len(packed) :]
            assert [(message.tag, message.data.nbytes) for message in whole] == [(2, 100)] * len(whole)
            assert [(message.tag, message.data.nbytes) for message in together] == [(0, 224)] * len(together)


@examples
@given(st.lists(st.sampled_from([1, 16, 4096, 1 << 17, 1 << 18]), min_size=1, max_size=4), st.integers(1, 600))
def test_scratch_for_packs_is_bounded(sizes: list[int], num_ranks: int) -> None:
    """All small tensors of a layer have room for each rank, unless there are too many of them or of ranks."""
    num_slots = 3
    weights = ExpertWeights({0: [torch.zeros(num_slots, size, dtype=torch.uint8) for size in sizes]})
    nbytes = packed_nbytes(weights, num_ranks)
    wanted = num_slots * sum(max(size, 16) for size in sizes if size < 1 << 18)
    assert nbytes == wanted if wanted * num_ranks <= PACKED_NBYTES else nbytes < wanted
    assert nbytes * num_ranks <= PACKED_NBYTES
    assert nbytes % 16 == 0


class _Work:
    """A work whose kernel has ended, well or because a peer is gone."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def wait(self) -> None:
        if self._error:
            raise RuntimeError(self._error)

    def synchronize(self) -> None:
        """Let the current stream wait."""


class _NotingGroup:
    """A group that records its posts."""

    def __init__(self, *works: _Work) -> None:
        self.posted: list[int] = []
        self._works = iter(works)

    def _start_coalescing(self, _device: torch.device) -> None:
        pass

    def _end_coalescing(self, _device: torch.device) -> _Work:
        return next(self._works)

    def recv(self, data: list[torch.Tensor], _peer: int, _tag: int) -> None:
        self.posted.append(data[0].data_ptr())

    send = recv


class _NotingDevice(CpuDevice):
    """Records its allocations."""

    def __init__(self) -> None:
        self.allocated: list[torch.Tensor] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.allocated.append(super().allocate(nbytes))
        return self.allocated[-1]


def link_of(group: object, device: CpuDevice) -> NcclLink:
    """Return a link of ranks 0 and 1 over a replacement of torch's group."""
    return NcclLink(group, lambda: None, device, {0: 0, 1: 1}, 48)  # type: ignore[arg-type]


def test_a_kernel_that_ended_without_its_data_is_no_arrival() -> None:
    """NCCL is asked about every group, once the device is past them all."""
    message = Message(1, 0, torch.zeros(8, dtype=torch.uint8))
    exchange = Exchange(0, (MessageGroup((message,), ()),) * 3)
    arrived = link_of(_NotingGroup(_Work(), _Work(), _Work()), CpuDevice()).prepare(exchange)()
    arrived(0.0)
    lost = link_of(_NotingGroup(_Work(), _Work("remote process exited"), _Work()), CpuDevice()).prepare(exchange)()
    with pytest.raises(RuntimeError, match="remote process exited"):
        lost(0.0)


def test_a_launch_posts_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """And packs nothing on the serving thread: scratch memory is written, posted, and read back."""
    group, device = _NotingGroup(_Work(), _Work()), _NotingDevice()
    link = link_of(group, device)
    sends, recvs = (
        tuple(Message(1, tag, torch.full((8,), tag + 10 * side, dtype=torch.uint8)) for tag in range(3))
        for side in range(2)
    )
    exchange = Exchange(0, (MessageGroup(sends, recvs),))
    (scratch,) = device.allocated
    launches = [link.prepare(exchange) for _ in range(2)]
    assert len(device.allocated) == 1
    (_, sent), (_, received) = scratch.view(2, 2, 48)
    received.fill_(7)
    monkeypatch.setattr(Packer, "posts", None)
    launches[0]()
    assert group.posted == [received.data_ptr(), sent.data_ptr()]
    assert sent.view(3, 16)[:, :8].tolist() == [[tag] * 8 for tag in range(3)]
    assert [message.data.tolist() for message in recvs] == [[7] * 8] * 3
    launches[1]()
    assert group.posted[2:] == group.posted[:2]


class _FailingGroup:
    """torch's group over NCCL's count of open groups, whose send fails inside a group of its own."""

    depth = 0

    def _start_coalescing(self, _device: torch.device) -> None:
        self.depth += 1

    def _end_coalescing(self, _device: torch.device) -> None:
        self.depth -= 1
        if self.depth <= 0:
            raise RuntimeError("an operation of this group had failed" if self.depth == 0 else "not in a group")

    def recv(self, _data: list[torch.Tensor], _peer: int, _tag: int) -> None:
        pass

    def send(self, _data: list[torch.Tensor], _peer: int, _tag: int) -> None:
        self.depth += 1
        raise RuntimeError("remote process exited")


def test_a_failed_launch_leaves_its_thread_in_no_group() -> None:
    """Or the next transport's operations, and the model's, would be taken for more of it, and never begin."""
    group = _FailingGroup()
    message = Message(1, 0, torch.zeros(8, dtype=torch.uint8))
    launch = link_of(group, CpuDevice()).prepare(Exchange(0, (MessageGroup((message,), (message,)),)))
    with pytest.raises(RuntimeError, match="remote process exited"):
        launch()
    assert group.depth == 0
