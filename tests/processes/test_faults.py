"""Real processes: whatever happens to one rank, the others know which, where and soon; and go on."""

import pytest
from support.accidents import CONTROL_TIMEOUT_S, LATE, OTHER_PLACEMENT, TIMEOUTS_S, Accident
from support.faulty_world import survivors_of

PHASES = ("planning", "transfer", "staged", "fence", "commit")
pytestmark = pytest.mark.alone

ACCIDENTS = [Accident(kind, phase) for kind in ("SIGKILL", "SIGSTOP") for phase in PHASES]
ACCIDENTS += [Accident("cut", "transfer"), Accident("SIGKILL", "transfer", victim=0), Accident("SIGKILL", "launch")]
ACCIDENTS += [Accident("SIGKILL", "transfer", transport="copy")]
ACCIDENTS += [Accident(kind, "turn", transport="copy", serves=False) for kind in ("SIGKILL", "SIGSTOP")]


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda a: f"{a.transport}: {a.kind} of rank {a.victim}, {a.phase}")
def test_survivors_go_on(accident: Accident) -> None:
    """A typed error names the rank, the layer and the phase in time; then all serve the same placement."""
    reports = survivors_of(accident)
    survivors = tuple(rank for rank in range(accident.num_ranks) if rank != accident.victim)
    assert [report.rank for report in reports] == list(survivors)
    for report in reports:
        assert report.named == (accident.victim,)
        assert report.error == "BrokenControlGroup" or (report.error, accident.phase) == ("UpdateNotBegun", "planning")
        assert report.phase in PHASES
        assert report.layer >= 0
        assert report.detected_s < TIMEOUTS_S + 2.0
        assert report.in_doubt or report.num_steps_after == 20
        assert report.members == survivors
        assert report.missing == {}
        assert report.wrong_slots == []
    assert len({report.placement for report in reports}) == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [(LATE, "UpdateNotBegun"), (OTHER_PLACEMENT, "PlacementDisagreement")],
    ids=[LATE, OTHER_PLACEMENT],
)
def test_all_go_on_without_an_update_that_one_begins_otherwise(kind: str, error: str) -> None:
    """A typed error names the rank in time, on it too; nothing has moved, and all serve on together."""
    accident = Accident(kind, "beginning")
    reports = survivors_of(accident)
    assert [report.rank for report in reports] == [0, 1, 2]
    for report in reports:
        if (kind, report.rank) == (LATE, accident.victim):
            assert report.error in ("StepMismatch", "UpdateAborted", "UpdateNotBegun")  # what it finds is over
        else:
            assert (report.error, report.named) == (error, (accident.victim,))
        assert report.detected_s < TIMEOUTS_S + CONTROL_TIMEOUT_S
        assert (report.layer, report.num_steps_after, report.in_doubt) == (0, 20, False)
        assert (report.members, report.rolled_forward, report.lost) == ((0, 1, 2), (), {})
        assert report.wrong_slots == []
    assert len({report.placement for report in reports}) == 1
