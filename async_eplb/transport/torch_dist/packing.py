"""Small messages to one peer are packed into one, in scratch memory."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from async_eplb.transport.exchange import Message, MessageGroup

SMALL_NBYTES = 1 << 18
"""Messages below this are packed: an operation costs the serving thread more than their copies cost the device."""


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

    :param allocate: returns device memory of so many bytes, as uint8 ``[bytes]``, for the stream that is current
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._scratch = {side: allocate(0) for side in ("sends", "recvs")}

    def posts(self, messages: MessageGroup) -> Posts:
        """Work out the posts of a group; with the stream of the launch current."""
        return Posts(*self._packed("sends", messages.sends), *self._packed("recvs", messages.recvs))

    def _packed(self, side: str, messages: Sequence[Message]) -> tuple[list[Message], list[tuple[Tensor, Tensor]]]:
        """Return posted messages, and pairs of a place in scratch memory and the data that belongs there."""
        posted, packs = pack(messages)
        scratch = self._reserve(side, sum(_padded(message.data.nbytes) for small in packs for message in small))
        pairs: list[tuple[Tensor, Tensor]] = []
        end = 0
        for small in packs:
            start = end
            for message in small:
                pairs.append((scratch[end : end + message.data.nbytes], message.data))
                end += _padded(message.data.nbytes)
            posted.append(Message(small[0].peer, small[0].tag, scratch[start:end]))
        return posted, pairs

    def _reserve(self, side: str, nbytes: int) -> Tensor:
        """Return scratch memory of at least so many bytes. Smaller memory is in use until the stream is past it."""
        scratch = self._scratch[side]
        if scratch.nbytes < nbytes:
            scratch = self._scratch[side] = self._allocate(nbytes)
        return scratch


def pack(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split messages into those that are posted as they are, and those of one peer that are posted as one.

    Both sides of a pair split alike, for they see the same sizes and tags.
    """
    small = [message for message in messages if message.data.nbytes < SMALL_NBYTES]
    small.sort(key=lambda message: (message.peer, message.tag))
    by_peer = (list(same) for _, same in groupby(small, key=lambda message: message.peer))
    packs = [same for same in by_peer if len(same) > 1]
    packed = {(message.peer, message.tag) for same in packs for message in same}
    return [message for message in messages if (message.peer, message.tag) not in packed], packs


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, on the current stream."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
