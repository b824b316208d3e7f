"""Updaters that are opened and closed many times, with faults, leave nothing on the device and nothing in the process.

In each cycle two processes allocate weights, open an updater, run an update, close it and free the weights. If one kept
the other's memory mapped, the device would have less free memory after each cycle. No other process may use the GPU.
"""

import sys

import pytest
from support.cycles import Cycles, left_after_cycles

from async_eplb.testing import World
from async_eplb.testing.sample_model import SampleModel

MODEL = SampleModel(hidden=512, intermediate=256)
"""0.7 MB an expert, 16 MB a rank: several allocations of the driver's."""
_WARM = 6
_SLACK_NBYTES = 4 << 20
"""Two of the driver's pages, over all cycles that are compared."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault_every", [0, 3])
@pytest.mark.parametrize("transport", ["dist", "copy"])
def test_nothing_is_left(transport: str, fault_every: int) -> None:
    """Free memory of the device, this process's tensors, files and threads are flat after the first cycles."""
    cycles = Cycles(transport, device="cuda", fault_every=fault_every, model=MODEL)  # type: ignore[arg-type]
    ranks = World(2, timeout_s=200).run(left_after_cycles, cycles)
    for rank, left in enumerate(ranks):
        faults = f"a fault every {fault_every} cycles" if fault_every else "no faults"
        sys.stdout.write(f"\n{transport}, {faults}, rank {rank}:\n")
        for what in ("free_nbytes", "allocated_nbytes", "num_files", "num_threads"):
            sys.stdout.write(f"  {what:<16} {[getattr(each, what) for each in left]}\n")
    for left in ranks:
        warm, later = left[:_WARM], left[_WARM:]
        assert sum(each.failed for each in left) == (cycles.number // fault_every if fault_every else 0)
        assert min(each.free_nbytes for each in later) >= min(each.free_nbytes for each in warm) - _SLACK_NBYTES
        assert max(each.allocated_nbytes for each in later) <= max(each.allocated_nbytes for each in warm)
        assert max(each.num_files for each in later) <= max(each.num_files for each in warm)
        assert max(each.num_threads for each in later) <= max(each.num_threads for each in warm)
