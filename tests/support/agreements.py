"""Agreements in the middle of an update, for tests of single rules."""

from dataclasses import replace

from async_eplb.agreement.ballot import Ballot, Decision, Status, Verdict
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import LaunchRule, Mode

READY = Ballot(generation=1, digest=7, staged=0, launchable=0, finished=0, fence=0, status=Status.OK)
ONE_STAGED = replace(READY, staged=1)


def serving(
    *, total: int = 4, window: int = 2, lead: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE
) -> Agreement:
    """Return an agreement in an update that all ranks have begun, beside a model that serves."""
    agreement = Agreement(lead=lead, launch_rule=launch_rule)
    agreement.begin(Mode.SERVING, digest=7, total=total, window=window)
    agreement.receive([READY, READY])
    return agreement


def exclusive(*, total: int = 4, window: int = 2, launch_rule: LaunchRule = LaunchRule.AT_ONCE) -> Agreement:
    """Return an agreement in an update that all ranks have begun, beside nothing."""
    agreement = Agreement(launch_rule=launch_rule)
    agreement.begin(Mode.EXCLUSIVE, digest=7, total=total, window=window)
    agreement.receive([READY, READY])
    return agreement


def decided(agreement: Agreement, *fences: int, staged: int = 1) -> Verdict:
    """Let layers be staged everywhere, and decided for the largest of the fences."""
    agreement.receive([replace(READY, staged=staged)] * len(fences))
    agreement.ballot()
    return agreement.receive([replace(READY, staged=staged, fence=fence) for fence in fences])


def passed(agreement: Agreement, boundaries: int) -> list[Decision | None]:
    """Pass boundaries and return what was due at each."""
    return [agreement.boundaries.pass_next() for _ in range(boundaries)]
