"""An expert of DeepSeek-V3 in FP8, 44 MB, whose weights benchmarks move: w13, w2 and their block scales."""

import math

import torch

from async_eplb.simulate.models import MODELS

_BLOCK = 128
_HIDDEN, _INTERMEDIATE = MODELS["deepseek-v3"].hidden, MODELS["deepseek-v3"].intermediate
_MATRICES = ((2 * _INTERMEDIATE, _HIDDEN), (_HIDDEN, _INTERMEDIATE))

EXPERT_TENSORS = (
    *((torch.float8_e4m3fn, shape) for shape in _MATRICES),
    *((torch.float32, (rows // _BLOCK, columns // _BLOCK)) for rows, columns in _MATRICES),
)
"""dtype and shape of each tensor"""
EXPERT_NBYTES = tuple(dtype.itemsize * math.prod(shape) for dtype, shape in EXPERT_TENSORS)
"""bytes of each tensor"""
