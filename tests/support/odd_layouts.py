"""Weights laid out as engines do: dimensions in another order, padding, gaps, a tensor for each expert."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from async_eplb.weights import Slots

Allocate = Callable[[int], Tensor]


def on_cpu(nbytes: int) -> Tensor:
    """Return memory of the CPU full of any bytes, so that padding is never equal: uint8 ``[bytes]``."""
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def transposed(tensor: Tensor, allocate: Allocate = on_cpu) -> Tensor:
    """Return an equal tensor, the dimensions of whose slots lie in reverse order, without gaps."""
    return _laid_out(tensor, allocate, padding=0)


def padded(tensor: Tensor, allocate: Allocate = on_cpu) -> Tensor:
    """Return the same with padding behind each column, as scales for TMA have it, and a gap after each slot."""
    return _laid_out(tensor, allocate, padding=3)


def apart(tensor: Tensor, allocate: Allocate = on_cpu) -> list[Tensor]:
    """Return a transposed tensor for each slot, in memory of its own."""
    return [transposed(slot[None], allocate)[0] for slot in tensor]


WAYS: tuple[Callable[[Tensor, Allocate], Slots], ...] = (transposed, padded, apart)


def oddly_laid_out(
    tensors: Mapping[int, Sequence[Tensor]], allocate: Allocate = on_cpu, *, first: int = 0
) -> dict[int, list[Slots]]:
    """Return equal weights, the tensors of each row laid out in one way after another.

    :param first: number of the way of each row's first tensor
    """
    return {
        row: [WAYS[(first + number) % len(WAYS)](tensor, allocate) for number, tensor in enumerate(given)]
        for row, given in tensors.items()
    }


def _laid_out(tensor: Tensor, allocate: Allocate, *, padding: int) -> Tensor:
    num_slots, *shape = tensor.shape
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step = step * size + padding
    memory = allocate(num_slots * max(step, prod(shape)) * tensor.element_size()).view(tensor.dtype)
    return memory.as_strided((num_slots, *shape), (step, *strides)).copy_(tensor)
