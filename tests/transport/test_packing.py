"""What an NCCL link makes of messages, and of works that NCCL says are done."""

from random import Random
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_eplb.device import CpuDevice
from async_eplb.transport import Exchange, Message, MessageGroup
from async_eplb.transport.torch_dist.nccl import NcclLink
from async_eplb.transport.torch_dist.packing import pack

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
    whole, packs = pack(mine)
    return (
        [message.tag for message in whole if message.peer == peer],
        [[message.tag for message in small] for small in packs if small[0].peer == peer],
    )


def unconnected_link() -> NcclLink:
    link = NcclLink.__new__(NcclLink)
    link._device = CpuDevice()
    link._scratch = {side: link._device.allocate(0) for side in ("sends", "recvs")}
    link._prepared = WeakKeyDictionary()
    return link


def test_a_prepared_exchange_needs_no_memory() -> None:
    """All is packed that is small, in scratch memory; what is never launched is forgotten."""
    link = unconnected_link()

    def group(num_peers: int) -> MessageGroup:
        messages = tuple(Message(peer, tag, torch.zeros(100)) for peer in range(num_peers) for tag in range(3))
        return MessageGroup(messages, messages[:6])

    exchange = Exchange(0, (group(2), group(5), group(1)))
    link.prepare(exchange)
    scratch = {side: memory.data_ptr() for side, memory in link._scratch.items()}
    link.prepare(exchange)
    assert {side: memory.data_ptr() for side, memory in link._scratch.items()} == scratch
    for number, each in enumerate(exchange.groups):
        (launched,) = exchange.parts()[number].groups
        posts = link._prepared[launched]
        for messages, posted, pairs in (
            (each.sends, posts.sends, posts.packing),
            (each.recvs, posts.recvs, posts.unpacking),
        ):
            assert len(posted) == len({message.peer for message in messages})
            assert [data for _, data in pairs] == [message.data for message in messages]
    del exchange, each, launched, messages
    assert len(link._prepared) == 0


class _Work:
    """A work whose kernel has ended, well or because a peer is gone."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def wait(self) -> None:
        if self._error:
            raise RuntimeError(self._error)


def test_a_kernel_that_ended_without_its_data_is_no_arrival() -> None:
    """NCCL is asked about every group, once the device is past them all."""
    link = NcclLink.__new__(NcclLink)
    link._device = CpuDevice()
    works = [_Work(), _Work("remote process exited"), _Work()]
    past = link._device.record()
    link._finish([works[0], works[2]], past, deadline=0.0)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="remote process exited"):
        link._finish(works, past, deadline=0.0)  # type: ignore[arg-type]


class _NotingGroup:
    """A group that notes what is posted."""

    def __init__(self) -> None:
        self.posted: list[int] = []

    def _start_coalescing(self, _device: torch.device) -> None:
        pass

    def _end_coalescing(self, _device: torch.device) -> "_NotingGroup":
        return self

    def synchronize(self) -> None:
        pass

    def recv(self, data: list[torch.Tensor], _peer: int, _tag: int) -> None:
        self.posted.append(data[0].data_ptr())

    send = recv


def test_a_launch_posts_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """And packs nothing on the serving thread; what was not prepared is packed there. Once each."""
    link = unconnected_link()
    link._place = {1: 1}
    link._group = group = _NotingGroup()  # type: ignore[assignment]
    messages = tuple(Message(1, tag, torch.zeros(8, dtype=torch.uint8)) for tag in range(3))
    exchange = Exchange(0, (MessageGroup(messages, messages),))
    link.prepare(exchange)
    with monkeypatch.context() as patch:
        patch.setattr(link, "_posts", None)
        link.launch(exchange)
    assert group.posted == [link._scratch[side].data_ptr() for side in ("recvs", "sends")]
    assert len(link._prepared) == 0
    link.launch(exchange)
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
    link = unconnected_link()
    link._place = {1: 1}
    link._group = group = _FailingGroup()  # type: ignore[assignment]
    message = Message(1, 0, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="remote process exited"):
        link._post(MessageGroup((message,), (message,)))
    assert group.depth == 0
