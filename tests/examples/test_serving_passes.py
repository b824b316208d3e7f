"""Agreement of the example server's ranks before a pass."""

import pytest

from serving.passes import Notice, PassPlan, balancedness

NOTHING = Notice(wave=3, num_rows=0, has_work=0, stopping=0)


@pytest.mark.parametrize(
    ("other", "plan"),
    [
        (NOTHING, PassPlan(idle=True, stop=False, max_rows=0, wave=3)),
        (NOTHING._replace(stopping=1), PassPlan(idle=True, stop=True, max_rows=0, wave=3)),
        (NOTHING._replace(wave=4), PassPlan(idle=False, stop=False, max_rows=0, wave=4)),
        (NOTHING._replace(wave=4, stopping=1), PassPlan(idle=False, stop=False, max_rows=0, wave=4)),
        (NOTHING._replace(has_work=1), PassPlan(idle=False, stop=False, max_rows=0, wave=3)),
        (NOTHING._replace(has_work=1, num_rows=5), PassPlan(idle=False, stop=False, max_rows=5, wave=3)),
        (NOTHING._replace(has_work=1, stopping=1), PassPlan(idle=False, stop=False, max_rows=0, wave=3)),
    ],
)
def test_ranks_rest_only_when_nobody_knows_of_work(other: Notice, plan: PassPlan) -> None:
    """Work anywhere, or word of it that has not reached every rank, keeps all of them running passes."""
    assert PassPlan.of([NOTHING, other]) == PassPlan.of([other, NOTHING]) == plan


def test_balancedness_is_mean_over_max() -> None:
    """Passes are added up by rank; layers are averaged, and one without rows is balanced."""
    first = ((4, 0), (0, 0))
    second = ((2, 0), (2, 0))
    assert balancedness([first, second]) == ((4 / 6) + 1) / 2
