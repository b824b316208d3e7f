"""Real processes that share a GPU: whatever happens to one rank, the others know which, where and soon; and go on.

What :mod:`test_faults` shows over gloo, with NCCL's kernels waiting for the rank that is gone, and with the copy engine
reading its memory. No process may be a client of MPS, whose server ends all of them when one is killed.
"""

import sys
from functools import partial

import pytest
from support.accidents import Accident
from support.faulty_world import survivors_of

PHASES = ("planning", "transfer", "staged", "fence", "commit")
on_gpu = partial(Accident, device="cuda", transfer_timeout_s=3.0, control_timeout_s=4.0)
ACCIDENTS = [on_gpu("SIGKILL", phase) for phase in ("planning", "launch", "transfer", "staged", "fence", "commit")]
ACCIDENTS += [on_gpu("SIGSTOP", phase) for phase in ("launch", "fence")]
ACCIDENTS += [on_gpu("SIGKILL", phase, transport="copy") for phase in ("transfer", "staged", "commit")]
ACCIDENTS += [on_gpu("SIGSTOP", "transfer", transport="copy")]
ACCIDENTS += [on_gpu(kind, "turn", transport="copy", serves=False) for kind in ("SIGKILL", "SIGSTOP")]


def _id(accident: Accident) -> str:
    return f"{accident.transport}: {accident.kind}, {accident.phase}"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("accident", ACCIDENTS, ids=_id)
def test_survivors_go_on(accident: Accident) -> None:
    """A typed error names the rank, the layer and the phase in time; then all serve the same placement."""
    reports = survivors_of(accident)
    timeouts_s = accident.transfer_timeout_s + accident.control_timeout_s
    if accident.kind == "SIGKILL":
        timeouts_s = accident.control_timeout_s  # of which nothing is needed, but that a busy host may take
    sys.stdout.write(f"\n{_id(accident)}: ")
    for report in reports:
        sys.stdout.write(
            f"rank {report.rank}: {report.error} of layer {report.layer} in {report.phase} after "
            f"{report.detected_s:.2f} s, {'in doubt, ' if report.in_doubt else ''}"
            f"recovered in {report.recovered_s:.2f} s; "
        )
    assert [report.rank for report in reports] == [0, 2]
    for report in reports:
        assert report.named == (accident.victim,)
        assert report.error == "BrokenControlGroup" or (report.error, accident.phase) == ("UpdateNotBegun", "planning")
        assert report.phase in PHASES
        assert report.layer >= 0
        assert report.detected_s < timeouts_s + 3.0
        assert report.in_doubt or report.num_steps_after == 20
        assert report.members == (0, 2)
        assert report.missing == {}
        assert report.wrong_slots == []
        assert report.num_watchdogs == 0
    assert len({report.placement for report in reports}) == 1
