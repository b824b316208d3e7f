"""The state of one rank between updates."""

from dataclasses import dataclass, field

from async_eplb.placement import ExpertPlacement
from async_eplb.update.run import UpdateRun
from async_eplb.update.summary import Totals


@dataclass(slots=True)
class RankState:
    """The state of one rank between updates.

    :param placement: that the live weights have, whether a recovery is complete or not
    :param gone: ranks that were lost and recovered from
    :param failed_run: the last update, if it failed in a way that needs a recovery; with the staging that it kept
    """

    placement: ExpertPlacement
    gone: tuple[int, ...] = ()
    failed_run: UpdateRun | None = None
    totals: Totals = field(default_factory=Totals)
