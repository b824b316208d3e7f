"""Batch-invariant arithmetic: everything that is done to a token is done in blocks of one fixed shape.

A matrix product may round differently for another number of rows, because another kernel computes it. So rows are
padded to blocks of :data:`BLOCK_ROWS`, and each block is computed by itself: a token's result then depends neither on
the other tokens of the batch nor on how many there are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_ROWS = 8
_EPSILON = 1e-6


def in_blocks(rows: Tensor) -> Tensor:
    """Pad ``rows`` ``[n, width]`` with zeros to ``[blocks, BLOCK_ROWS, width]``; at least one block."""
    num_blocks = max(1, -(-len(rows) // BLOCK_ROWS))
    padded = rows.new_zeros(num_blocks * BLOCK_ROWS, rows.shape[1])
    padded[: len(rows)] = rows
    return padded.view(num_blocks, BLOCK_ROWS, -1)


def by_block(function: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """Apply a function of ``[BLOCK_ROWS, width]`` to each block and stack the results."""
    return torch.stack([function(block) for block in blocks.unbind()])


def rms_norm(block: Tensor) -> Tensor:
    """Scale each row to a mean square of one (Zhang and Sennrich, 2019)."""
    return block * (block.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()


def swiglu(block: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> Tensor:
    """Return the gated feed-forward layer of one expert (Shazeer, 2020), its weights scaled by output.

    :param block: ``[BLOCK_ROWS, hidden]``
    :param w13: ``[2 * intermediate, hidden]``, gate above up; the scale ``[2 * intermediate]``
    :param w2: ``[hidden, intermediate]``; the scale ``[hidden]``
    """
    gate, up = (block @ w13.float().T * w13_scale).chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate.contiguous()) * up
    return activated @ w2.float().T * w2_scale
