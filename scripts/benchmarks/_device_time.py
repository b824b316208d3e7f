"""How long a CUDA device works, however long its host takes."""

from collections.abc import Callable

import torch

_SLEEP_CYCLES = 10_000_000
"""The device sleeps so long, about 5 ms, that what is to be timed is enqueued before it begins."""


def device_time_ms(call: Callable[[], object]) -> float:
    """Return what the device takes for what a call enqueues on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call] # noqa: SLF001 - torch has no other
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
