"""No interleaving breaks the agreement, and every rule of it is needed: without it, some interleaving does.

The bounds are in the worlds below: two ranks with up to three layers and steps up to three apart, three ranks with
up to three layers and neighbouring steps. Each explores all of its states. Run with ``-s`` to see how many.
"""

import inspect
import sys
from dataclasses import replace

import pytest
from support.agreement_model import Do, Violation, World
from support.agreement_search import explore

from async_eplb.agreement import agreed, boundaries, checks, lead, protocol
from async_eplb.agreement.rules import LaunchRule, Mode

WORLDS = {
    "two ranks, three layers": World(leads=(1, 2), layers=3, window=2),
    "two ranks, three steps apart": World(leads=(1, 2), layers=3, skew=3),
    "three ranks": World(leads=(1, 2, 2), layers=2),
    "three ranks, three layers": World(leads=(1, 1, 1), layers=3),
    "three ranks, one-sided transfers": World(leads=(1, 1, 1), layers=2, one_sided=True),
    "three ranks, ordered launches": World(leads=(1, 1, 1), layers=2, launch_rule=LaunchRule.ORDERED),
    "ordered launches, two buffers": World(leads=(1, 2), layers=2, window=2, launch_rule=LaunchRule.ORDERED),
    "launches in parts": World(leads=(1, 2), layers=2, parts=2, window=2, launch_rule=LaunchRule.ORDERED),
    "three ranks, launches in parts": World(leads=(1, 1, 1), layers=1, parts=3, launch_rule=LaunchRule.ORDERED),
    "three ranks, granted transfers": World(leads=(1, 1, 1), layers=2, launch_rule=LaunchRule.GRANTED, one_sided=True),
    "granted, two buffers": World(leads=(1, 2), layers=3, window=2, launch_rule=LaunchRule.GRANTED, one_sided=True),
    "granted, two updates": World(
        leads=(1, 2), layers=1, launch_rule=LaunchRule.GRANTED, one_sided=True, updates=2, at_once=False
    ),
    "granted, rounds only when eager": World(
        leads=(1, 1), layers=2, window=2, launch_rule=LaunchRule.GRANTED, one_sided=True, eager=True
    ),
    "leads grow": World(leads=(1, 1), layers=2, budget=(Do.WAITED, Do.WAITED)),
    "two updates": World(leads=(1, 2), layers=2, updates=2, at_once=False),
    "two updates of three ranks": World(leads=(1, 1, 1), layers=1, updates=2, at_once=False),
    "rounds only when eager": World(leads=(1, 1), layers=2, window=2, eager=True),
    "cancelled": World(leads=(1, 1, 1), layers=2, budget=(Do.CANCEL,)),
    "cancelled at two buffers": World(leads=(1, 1), layers=2, window=2, one_sided=True, budget=(Do.CANCEL,)),
    "cancelled twice": World(leads=(1, 2), layers=2, at_once=False, budget=(Do.CANCEL, Do.CANCEL)),
    "cancelled before launches": World(
        leads=(1, 1), layers=2, window=2, launch_rule=LaunchRule.ORDERED, budget=(Do.CANCEL,)
    ),
    "cancelled between parts": World(
        leads=(1, 1), layers=2, parts=2, window=2, launch_rule=LaunchRule.ORDERED, budget=(Do.CANCEL,)
    ),
    "failed": World(leads=(1, 1, 1), layers=1, at_once=False, budget=(Do.FAIL,)),
    "failed, two layers": World(leads=(1, 2), layers=2, budget=(Do.FAIL,)),
    "failed, then updated": World(leads=(1, 1), layers=1, updates=2, at_once=False, budget=(Do.FAIL,)),
    "failed, then updated by grants": World(
        leads=(1, 1), layers=1, updates=2, launch_rule=LaunchRule.GRANTED, one_sided=True, budget=(Do.FAIL,)
    ),
    "given up, then updated": World(leads=(1, 1), layers=1, updates=3, at_once=False, budget=(Do.GIVE_UP,)),
    "left": World(leads=(1, 1, 1), layers=1, budget=(Do.LEAVE,)),
    "left with launches": World(leads=(1, 2), layers=2, launch_rule=LaunchRule.ORDERED, budget=(Do.LEAVE,)),
    "exclusive": World(leads=(1, 1, 1), layers=2, mode=Mode.EXCLUSIVE, updates=2, at_once=False),
    "exclusive, cancelled": World(
        leads=(1, 1, 1), layers=2, mode=Mode.EXCLUSIVE, launch_rule=LaunchRule.ORDERED, budget=(Do.CANCEL,)
    ),
    "exclusive, granted, cancelled": World(
        leads=(1, 1, 1),
        layers=2,
        mode=Mode.EXCLUSIVE,
        launch_rule=LaunchRule.GRANTED,
        one_sided=True,
        budget=(Do.CANCEL,),
    ),
    "exclusive, granted in order, cancelled": World(
        leads=(1, 1),
        layers=3,
        window=2,
        mode=Mode.EXCLUSIVE,
        launch_rule=LaunchRule.GRANTED_IN_ORDER,
        budget=(Do.CANCEL,),
    ),
    "ranks stand": World(leads=(2, 2), layers=1, standing=True),
    "traffic ends": World(leads=(1, 2), layers=2, budget=(Do.QUIET,)),
    "traffic ends before launches": World(leads=(2, 2), layers=1, launch_rule=LaunchRule.ORDERED, budget=(Do.QUIET,)),
    "traffic ends between parts": World(
        leads=(1, 2), layers=2, parts=3, launch_rule=LaunchRule.ORDERED, budget=(Do.QUIET,)
    ),
    "left between parts": World(leads=(1, 2), layers=2, parts=2, launch_rule=LaunchRule.ORDERED, budget=(Do.LEAVE,)),
    "traffic ends, rounds only when eager": World(leads=(2, 2), layers=1, eager=True, budget=(Do.QUIET,)),
    "cancelled before grants of two layers": World(
        leads=(1, 1), layers=2, window=2, launch_rule=LaunchRule.GRANTED, one_sided=True, budget=(Do.CANCEL,)
    ),
    "failed while ranks stand and lead by one": World(leads=(1, 1), layers=1, standing=True, budget=(Do.FAIL,)),
    "failed while traffic ends at one layer": World(leads=(1, 2), layers=1, budget=(Do.FAIL, Do.QUIET)),
    "failed while traffic ends between parts, both lead by one": World(
        leads=(1, 1), layers=1, parts=3, launch_rule=LaunchRule.ORDERED, budget=(Do.FAIL, Do.QUIET)
    ),
}

LARGE_WORLDS = {
    "cancelled before grants": World(
        leads=(1, 1), layers=3, window=2, launch_rule=LaunchRule.GRANTED, one_sided=True, budget=(Do.CANCEL,)
    ),
    "ranks stand between parts": World(leads=(1, 1), layers=1, parts=2, launch_rule=LaunchRule.ORDERED, standing=True),
    "given up by one of three, then updated": World(
        leads=(1, 1, 1), layers=1, updates=3, at_once=False, budget=(Do.GIVE_UP,)
    ),
    "failed while ranks stand": World(leads=(2, 2), layers=1, standing=True, budget=(Do.FAIL,)),
    "failed while traffic ends": World(leads=(1, 2), layers=2, budget=(Do.FAIL, Do.QUIET)),
    "failed while traffic ends between parts": World(
        leads=(1, 2), layers=1, parts=3, launch_rule=LaunchRule.ORDERED, budget=(Do.FAIL, Do.QUIET)
    ),
}
"""The same kinds of worlds with more states."""


@pytest.mark.parametrize(
    ("name", "world"),
    [
        *(pytest.param(name, world, id=name) for name, world in WORLDS.items()),
        *(pytest.param(name, world, id=name, marks=pytest.mark.exhaustive) for name, world in LARGE_WORLDS.items()),
    ],
)
def test_no_interleaving_breaks_the_agreement(name: str, world: World) -> None:
    """All ranks commit the same layers at the same boundaries, and always get to the end."""
    found = explore(world)
    sys.stdout.write(f"\n{name}: {found.states} states, {found.transitions} transitions in {found.seconds:.1f} s")
    assert found.ends


def test_leads_may_shrink_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later layer is not decided for an earlier boundary than one before it."""
    monkeypatch.setattr(lead, "_CALM_DECISIONS", 1)
    assert explore(World(leads=(4, 4), layers=2, window=2)).ends


TWO = World(leads=(1, 1), layers=2, window=2)
LAUNCHES = replace(TWO, launch_rule=LaunchRule.ORDERED)
PARTS = replace(LAUNCHES, parts=2)
GRANTS = replace(TWO, launch_rule=LaunchRule.GRANTED, one_sided=True)
CANCELLED = World(leads=(1, 1), layers=2, budget=(Do.CANCEL,))
CANCELLED_LAUNCHES = replace(LAUNCHES, budget=(Do.CANCEL,))
CANCELLED_GRANTS = replace(GRANTS, budget=(Do.CANCEL,))
FAILED = World(leads=(1, 1), layers=1, budget=(Do.FAIL,))
LEFT = World(leads=(2, 2), layers=2, window=2, budget=(Do.LEAVE,))
AGAIN = World(leads=(1, 1), layers=1, updates=2, at_once=False)
EXCLUSIVE = World(leads=(1, 1), layers=2, mode=Mode.EXCLUSIVE)
STANDING = World(leads=(1, 1), layers=1, standing=True)
QUIET = World(leads=(2, 2), layers=1, budget=(Do.QUIET,))
FAILED_QUIET = World(leads=(1, 2), layers=1, budget=(Do.FAIL, Do.QUIET))
FAILED_STANDING = World(leads=(1, 2), layers=1, standing=True, budget=(Do.FAIL,))

LEAST = "update.seen = Counts.least(ballots)"
SEEN = LEAST + "; update.seen = replace(update.seen, {0}=update.{0})"
MUTATIONS = {
    "decided for the smallest fence": (TWO, "boundary = max(fences)", "boundary = min(fences)"),
    "decided for some rank's fence": (TWO, "boundary = max(fences)", "boundary = fences[0]"),
    "no lead": (TWO, "self.step + lead,", "self.step,"),
    "the fence itself is passed": (TWO, "self.step + 1) < self.fence", "self.step + 1) <= self.fence"),
    "a fence holds nothing": (TWO, "return not self.fence or (number or self.step + 1) < self.fence", "return True"),
    "a fence is never lifted": (TWO, "        boundaries.fence = 0\n", ""),
    "a decision replaces earlier ones": (TWO, "if each.boundary < boundary)", "if False)"),
    "only the first of what is due is done": (LEFT, "return due[-1]", "return due[0]"),
    "staged here": (TWO, LEAST, SEEN.format("staged")),
    "staged here, in the exclusive mode": (EXCLUSIVE, LEAST, SEEN.format("staged")),
    "launchable here": (LAUNCHES, LEAST, SEEN.format("launchable")),
    "all parts at one boundary": (PARTS, "Decision(boundary + number,", "Decision(boundary,"),
    "two layers' parts at one boundary": (
        PARTS,
        "self.last + 1)",
        "self.last)",
    ),
    "decided for boundaries of a layer's later parts": (
        PARTS,
        "self.last = self.decisions[-1].boundary",
        "self.last = boundary",
    ),
    "granted here": (GRANTS, LEAST, SEEN.format("launchable")),
    "nobody tells of grants": (
        replace(GRANTS, eager=True),
        "self.launch_rule is not LaunchRule.AT_ONCE and",
        "self.launch_rule is LaunchRule.ORDERED and",
    ),
    "cancelled before what was granted": (
        CANCELLED_GRANTS,
        "return max(update.launched, update.agreed)",
        "return update.agreed",
    ),
    "committed here": (TWO, LEAST, SEEN.format("finished")),
    "over when all is agreed": (TWO, "update.seen.finished >= update.limit  #", "update.agreed >= update.limit  #"),
    "fences in the exclusive mode": (EXCLUSIVE, "elif update.mode is Mode.EXCLUSIVE:", "elif False:"),
    "cancelled without the window": (CANCELLED, "return update.agreed + update.window", "return update.agreed"),
    "cancelled before what was launched": (
        CANCELLED_LAUNCHES,
        "return max(update.launched, update.agreed)",
        "return update.agreed",
    ),
    "cancelled after what is staged here": (CANCELLED, "self._under_way())", "update.staged)"),
    "cancelled after the end": (CANCELLED, "min(update.limit, self._under_way())", "self._under_way()"),
    "launched after the limit": (
        CANCELLED_LAUNCHES,
        "min(update.limit, update.seen.launchable)",
        "update.seen.launchable",
    ),
    "a failure changes nothing": (FAILED, "        if failed:", "        if False:"),
    "a leaving rank changes nothing": (LEFT, "        if gone:", "        if False:"),
    "not over when a rank has left": (LEFT, "update.over = update.over or self.running", "pass"),
    "a leaving rank drops what was decided": (LEFT, "self._due(self.last)", "self._due(self.step)"),
    "rounds count before all have begun": (AGAIN, "        if waiting_for:", "        if False:"),
    "rounds count after the end": (
        AGAIN,
        "if not self.running or update.over:\n            return self._verdict",
        "if not self.running:\n            return self._verdict",
    ),
    "all updates have one number": (AGAIN, "self.generation = generation or self.following", "self.generation = 1"),
    "a standing rank keeps its lead": (QUIET, "self.step + 1 if self.standing else max(", "max("),
    "no fence for what is out of reach": (QUIET, " or self._is_out_of_reach(ballots)\n", "\n"),
    "what is out of reach stays there": (QUIET, " or max(fences) < self.boundaries.last)", ")"),
    "a standing rank waits for its boundary": (QUIET, "self._due(self.step + 1)", "self._due(self.step)"),
    "a standing rank does not wait": (
        replace(STANDING, leads=(2, 2)),
        "self._due(self.step + 1)",
        "self._due(self.step + 2)",
    ),
    "nothing moves forward after a failure": (FAILED_QUIET, "moves = here < self.boundaries.last", "moves = False"),
    "what moves forward after a failure is for the last rank": (
        FAILED_STANDING,
        "here = max(fences) if all(fences)",
        "here = min(fences) if all(fences)",
    ),
    "after a failure, what moves forward is for ranks that may go on": (
        FAILED_STANDING,
        "here = max(fences) if all(fences)",
        "here = self.boundaries.step + 1 if self._is_out_of_reach(ballots)",
    ),
    "nobody wants a fence after a failure": (
        FAILED_QUIET,
        "        self.boundaries.fence_wanted = self._is_out_of_reach(ballots)\n",
        "",
    ),
    "steps of one round are compared": (STANDING, "min(steps) < stood_before", "len(set(steps)) > 1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_rule_is_needed(name: str) -> None:
    """The search finds an interleaving that breaks the agreement without the rule."""
    world, rule, instead = MUTATIONS[name]
    with pytest.raises(Violation):
        explore(replace(world, agreement=_changed(rule, instead)))


RULES = (
    boundaries.Boundaries,
    checks.require_same_update,
    checks.require_same_steps,
    agreed.Counts,
    agreed.Agreed,
    protocol.Agreement,
)


def _changed(rule: str, instead: str) -> type[protocol.Agreement]:
    """Return the agreement with a rule of its source replaced."""
    source = "\n\n".join(inspect.getsource(each) for each in RULES)
    assert source.count(rule) == 1
    names = {**vars(checks), **vars(boundaries), **vars(agreed), **vars(protocol), "replace": replace}
    exec(source.replace(rule, instead), names)  # noqa: S102 - our own source
    changed: type[protocol.Agreement] = names["Agreement"]
    return changed
