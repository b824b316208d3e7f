"""Scenarios: a simulated world and what goes wrong in it, as values drawn from a seed."""

import json
import random
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from async_eplb.agreement.rules import LaunchRule
from async_eplb.arguments import Flag, Real, Whole, settle, take
from async_eplb.errors import InvalidOptions
from async_eplb.workers import Work


class Mishap(Enum):
    """A kind of thing that can go wrong."""

    DELAY = "delay"
    """Messages to a rank come late."""
    DROP = "drop"
    """Messages to a rank are lost."""
    DUPLICATE = "duplicate"
    """Messages to a rank come twice."""
    CORRUPT = "corrupt"
    """A byte of messages to a rank is changed."""
    KILL = "kill"
    """A rank stops for good, and its connections are closed."""
    FREEZE = "freeze"
    """A rank does nothing for a time, and its connections stay."""
    CANCEL = "cancel"
    """The caller of an update cancels it."""
    CANCEL_NATIVELY = "cancel natively"
    """The task that waits for an update or a step is cancelled by asyncio itself."""
    LEAVE = "leave"
    """A rank leaves its updater, also in the middle of an update."""
    FAIL_ALLOCATION = "fail allocation"
    """The device has no memory for staging."""
    FAIL_WORK = "fail work"
    """A function in a worker thread fails."""
    TEAR = "tear"
    """The copies of a commit fail half way."""
    LOSE_ROUND = "lose round"
    """A rank does not get the result of a control round, and gives up."""
    SLOW_WORK = "slow work"
    """A kind of work takes a rank long, so that staging is full."""


WORK = (Work.PLAN, Work.TRANSFER, Work.COMMIT, Work.FINISH)
"""Kinds of work that can fail or be slow."""
_LATEST_EVENT = 1500


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that goes wrong.

    :param rank: the rank that it happens to
    :param event: number of the event after which it happens, for kills, freezes, leaves and cancellations
    :param layer: of the messages or copies
    :param peer: the rank that sends the messages
    :param count: number of the allocation, the function or the control round, from 0
    :param work: kind of work (:class:`async_eplb.workers.Work`)
    :param seconds: of a delay, a freeze or slow work
    """

    mishap: Mishap
    rank: int
    event: int = 0
    layer: int = 0
    peer: int = 0
    count: int = 0
    work: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        counts = ("rank", "event", "layer", "peer", "count")
        settle(self, InvalidOptions, seconds=Real(), **dict.fromkeys(counts, Whole(0)))


@dataclass(frozen=True, slots=True)
class Tuning:
    """Options of the updaters of a world.

    :param sources: of the planner
    """

    staging_depth: int = 2
    lead: int = 2
    operations_per_group: int = 256
    verify: str = "checksum"
    sources: str = "chunked"

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, **dict.fromkeys(("staging_depth", "lead", "operations_per_group"), Whole(1)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Forward passes of a world whose ranks serve.

    :param idle_every: forward passes between two times in ``ExpertUpdater.idle``; 0 for never
    :param pause_after: forward pass after which traffic pauses for several time-outs; 0 for never
    :param numbered: ranks pass the number of the step to ``ExpertUpdater.step``
    """

    idle_every: int = 0
    pause_after: int = 0
    numbered: bool = False

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, idle_every=Whole(0), pause_after=Whole(0), numbered=Flag())


@dataclass(frozen=True, slots=True)
class Scenario:
    """One world and what happens in it; equal scenarios give equal runs.

    :param seed: of every choice of the scheduler and every duration
    :param num_slots: of each rank
    :param serving: ranks serve while weights move; otherwise they wait for the end of the update
    :param goes_on: after an update that failed and left no doubt, ranks begin the next one without a recovery
    :param by_policy: placements are a policy's for a random load; otherwise they are random themselves
    """

    seed: int
    num_ranks: int = 2
    num_nodes: int = 1
    num_layers: int = 2
    num_slots: int = 2
    num_experts: int = 3
    num_updates: int = 1
    serving: bool = False
    goes_on: bool = False
    by_policy: bool = False
    traffic: Traffic = Traffic()
    tuning: Tuning = Tuning()
    launch_rule: LaunchRule = LaunchRule.AT_ONCE
    reorder: bool = False
    troubles: tuple[Trouble, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("num_ranks", "num_nodes", "num_layers", "num_slots", "num_experts", "num_updates")
        flags = ("serving", "goes_on", "by_policy", "reorder")
        settle(self, InvalidOptions, seed=Whole(0), **dict.fromkeys(sizes, Whole(1)))
        settle(self, InvalidOptions, **dict.fromkeys(flags, Flag()))

    def to_json(self) -> str:
        """Return the scenario on one line."""
        return json.dumps(asdict(self), default=lambda value: value.value)

    @classmethod
    def from_json(cls, text: str) -> "Scenario":
        """Read a scenario that :meth:`to_json` wrote.

        :raises ValueError: if the text is no such scenario
        """
        try:
            values: dict[str, Any] = json.loads(text)
            values["traffic"] = Traffic(**values["traffic"])
            values["tuning"] = Tuning(**values["tuning"])
            values["launch_rule"] = LaunchRule(values["launch_rule"])
            values["troubles"] = tuple(
                Trouble(**{**trouble, "mishap": Mishap(trouble["mishap"])}) for trouble in values["troubles"]
            )
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no scenario: {error!r}") from error


def scenario_for(seed: int) -> Scenario:
    """Draw the scenario of a seed.

    :raises InvalidOptions: if the seed is no whole number of at least 0
    """
    seed = take(seed, Whole(0), "seed", InvalidOptions)
    rng = random.Random(seed)  # noqa: S311 - repeatable worlds, not secrets
    num_ranks = rng.choice((2, 2, 3, 3, 4))
    num_layers = rng.choice((2, 2, 3, 3, 4))
    num_slots = rng.choice((2, 2, 3))
    serving = rng.random() < 0.6  # noqa: PLR2004 - a share
    physical = num_ranks * num_slots
    num_troubles = rng.choice((0, 1, 1, 1, 2, 2, 3))
    troubles = tuple(_trouble(rng, num_ranks, num_layers) for _ in range(num_troubles))
    corrupt = any(trouble.mishap is Mishap.CORRUPT for trouble in troubles)
    scenario = Scenario(
        seed=seed,
        num_ranks=num_ranks,
        num_nodes=2 if num_ranks % 2 == 0 and rng.random() < 0.5 else 1,  # noqa: PLR2004 - a share
        num_layers=num_layers,
        num_slots=num_slots,
        num_experts=rng.randint(max(2, physical // 2), physical - rng.choice((0, 1))),
        num_updates=rng.choice((1, 1, 2)),
        serving=serving,
        traffic=Traffic(idle_every=rng.choice((0, 0, 3, 8)), numbered=rng.random() < 0.5),  # noqa: PLR2004 - a share
        by_policy=rng.random() < 0.3,  # noqa: PLR2004 - a share
        tuning=Tuning(
            staging_depth=rng.choice((1, 2, 2, 3)),
            lead=rng.choice((1, 1, 2, 4)),
            operations_per_group=rng.choice((4, 8, 256)),
            verify="checksum" if corrupt else rng.choice(("off", "canary", "checksum")),
        ),
        launch_rule=rng.choice(tuple(LaunchRule)),
        reorder=rng.random() < 0.3,  # noqa: PLR2004 - a share
        troubles=troubles,
    )
    scenario = _relaying(scenario, rng) if rng.random() < 0.2 else scenario  # noqa: PLR2004 - a share
    return _pausing(scenario, random.Random(-1 - seed))  # noqa: S311 - its own, so that other choices stay


def _pausing(scenario: Scenario, rng: random.Random) -> Scenario:
    """Return the scenario with a pause of traffic, or one in which ranks go on after failures, or as it is."""
    pause_after = rng.choice((0, 0, rng.randint(1, 30))) if scenario.serving else 0
    goes_on = rng.random() < 0.4  # noqa: PLR2004 - a share
    num_updates = scenario.num_updates + goes_on
    traffic = replace(scenario.traffic, pause_after=pause_after)
    return replace(scenario, traffic=traffic, goes_on=goes_on, num_updates=num_updates)


def _relaying(scenario: Scenario, rng: random.Random) -> Scenario:
    """Return the scenario changed so that ranks relay experts: two nodes, replicas, and a transport that sends."""
    return replace(
        scenario,
        num_ranks=4,
        num_nodes=2,
        num_experts=rng.randint(2 * scenario.num_slots, 3 * scenario.num_slots),
        launch_rule=rng.choice((LaunchRule.AT_ONCE, LaunchRule.ORDERED)),
        tuning=replace(scenario.tuning, sources="relayed"),
    )


def _trouble(rng: random.Random, num_ranks: int, num_layers: int) -> Trouble:
    rank = rng.randrange(num_ranks)
    return Trouble(
        mishap=rng.choice((*Mishap, Mishap.KILL, Mishap.FREEZE, Mishap.LOSE_ROUND)),
        rank=rank,
        event=rng.randrange(_LATEST_EVENT),
        layer=rng.randrange(num_layers),
        peer=(rank + rng.randrange(1, num_ranks)) % num_ranks,
        count=rng.choice((0, 0, 1, 2, 3, 5, 8, 13, 21)),
        work=rng.choice(WORK),
        seconds=rng.choice((0.05, 0.3, 1.5, 3.0, 6.0, 20.0)),
    )
