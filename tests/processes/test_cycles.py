"""Updaters that are opened and closed many times, with faults, leave no file and no thread behind."""

import pytest
from support.cycles import Cycles, left_after_cycles

from async_eplb.testing import World
from async_eplb.testing.sample_model import SampleModel

SMALL = SampleModel(hidden=16, intermediate=8)
_WARM = 3


@pytest.mark.parametrize("cycles", [Cycles(t, number=9, fault_every=3, model=SMALL) for t in ("dist", "copy")])
def test_nothing_is_left(cycles: Cycles) -> None:
    """As many as after the first cycles; an update that a rank aborted is like any other."""
    for left in World(2, timeout_s=120).run(left_after_cycles, cycles):
        assert [each.failed for each in left] == [False, False, True] * 3
        assert max(each.num_files for each in left[_WARM:]) <= max(each.num_files for each in left[:_WARM])
        assert max(each.num_threads for each in left[_WARM:]) <= max(each.num_threads for each in left[:_WARM])
