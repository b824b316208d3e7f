"""Small messages to one peer are packed into one."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from async_eplb.transport.base import Message

SMALL_NBYTES = 1 << 18
"""Messages below this are packed: an operation costs the serving thread more than their copies cost the device."""


_ALIGNMENT = 16


def pack(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Cut messages into those that are posted as they are, and those of one peer that are posted as one.

    Both sides of a pair cut alike, for they see the same sizes and tags.
    """
    small = [message for message in messages if message.data.nbytes < SMALL_NBYTES]
    small.sort(key=lambda message: (message.peer, message.tag))
    by_peer = (list(same) for _, same in groupby(small, key=lambda message: message.peer))
    packs = [same for same in by_peer if len(same) > 1]
    packed = {(message.peer, message.tag) for same in packs for message in same}
    return [message for message in messages if (message.peer, message.tag) not in packed], packs


def packed_nbytes(packs: Sequence[Sequence[Message]]) -> int:
    """Return the bytes that packs take, padding included."""
    return sum(_padded(message.data.nbytes) for small in packs for message in small)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, on the current stream."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
