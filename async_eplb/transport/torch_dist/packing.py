"""Small messages to one peer are packed into one, in scratch memory."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from async_eplb.transport.exchange import Message, MessageGroup
from async_eplb.weights import ExpertWeights

SMALL_NBYTES = 1 << 18
"""Messages below this are packed: an operation costs the serving thread more than their copies cost the device."""
PACKED_NBYTES = 8 << 20
"""Most scratch memory of a communicator for what is packed, and as much for what is unpacked."""
_ALIGNMENT = 16


class Posts(NamedTuple):
    """The messages that are posted for a group, and the copies that pack and unpack them.

    :param packing: pairs of a place in scratch memory and the data that is copied there before the messages are posted
    :param unpacking: pairs of a place in scratch memory and the data that it is copied to when they have arrived
    """

    sends: list[Message]
    packing: list[tuple[Tensor, Tensor]]
    recvs: list[Message]
    unpacking: list[tuple[Tensor, Tensor]]


class Packer:
    """Works out posts. All groups use the same scratch memory: when one is launched, the stream is past the one before.

    :param scratch: of what is sent, and of what is received: device memory uint8 ``[2, places, bytes]``
    :param place: rank of the EP group -> where its messages are in scratch
    """

    def __init__(self, scratch: Tensor, place: Mapping[int, int]) -> None:
        self._sent, self._received = scratch
        self._place = place

    def posts(self, messages: MessageGroup) -> Posts:
        """Work out the posts of a group."""
        return Posts(*self._packed(self._sent, messages.sends), *self._packed(self._received, messages.recvs))

    def _packed(
        self, scratch: Tensor, messages: Sequence[Message]
    ) -> tuple[list[Message], list[tuple[Tensor, Tensor]]]:
        """Return posted messages, and pairs of a place in scratch memory and the data that belongs there."""
        posted, packs = pack(messages, scratch.shape[1])
        pairs: list[tuple[Tensor, Tensor]] = []
        for small in packs:
            place, end = scratch[self._place[small[0].peer]], 0
            for message in small:
                pairs.append((place[end : end + message.data.nbytes], message.data))
                end += _padded(message.data.nbytes)
            posted.append(Message(small[0].peer, small[0].tag, place[:end]))
        return posted, pairs


def packed_nbytes(weights: ExpertWeights, num_ranks: int) -> int:
    """Return the bytes of scratch memory for what is packed for one rank, equal on both sides of a pair.

    That is all small tensors of as many experts as a rank has slots, unless all ranks together would have more than
    :data:`PACKED_NBYTES` then.
    """
    small = max(sum(_padded(n) for n in weights.slot_nbytes(row) if n < SMALL_NBYTES) for row in weights.rows)
    fair_share = PACKED_NBYTES // num_ranks // _ALIGNMENT * _ALIGNMENT
    return min(weights.num_local_physical_experts * small, fair_share)


def pack(messages: Sequence[Message], room: int) -> tuple[list[Message], list[list[Message]]]:
    """Split messages into those that are posted as they are, and those of one peer that are posted as one.

    Both sides of a pair split alike, for they see the same sizes and tags.

    :param room: padded bytes that are packed for a peer at most
    """
    small = [message for message in messages if message.data.nbytes < SMALL_NBYTES]
    small.sort(key=lambda message: (message.peer, message.tag))
    packs = []
    for _, of_peer in groupby(small, key=lambda message: message.peer):
        same = list(of_peer)
        ends = accumulate(_padded(message.data.nbytes) for message in same)
        fitting = [message for message, end in zip(same, ends, strict=True) if end <= room]
        if len(fitting) > 1:
            packs.append(fitting)
    packed = {(message.peer, message.tag) for same in packs for message in same}
    return [message for message in messages if (message.peer, message.tag) not in packed], packs


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, on the current stream."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
