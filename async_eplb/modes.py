"""Autograd and inference mode of the calling thread, which must not matter (rule 21), nor what subclasses override."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def outside_modes() -> Iterator[None]:
    """Make tensors and views that may be written later, inside and outside of the caller's modes. Also a decorator.

    A tensor that is made in inference mode cannot be written outside of it. Subclasses of tensors are seen as torch
    itself sees them, whatever their ``__torch_function__`` says.
    """
    with torch.inference_mode(mode=False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield
