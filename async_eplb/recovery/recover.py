"""How survivors of a failure agree again: compare layers, roll the one in doubt forward, fetch what is lost.

All survivors do this together, over a new transport, and none of them serves meanwhile. No step is trusted to have
happened on other ranks: each tells the others what it has, and all draw the same conclusion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from async_eplb.agreement.outlook import Outlook
from async_eplb.errors import PlacementDisagreement, RankMismatch
from async_eplb.recovery.lost import fetch_lost, publish
from async_eplb.recovery.roll_forward import roll_forward
from async_eplb.recovery.state import Attempt, Attempts, Recovery
from async_eplb.recovery.survivors import homes, vacated, without_ranks
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.transport.base import ControlGroup
from async_eplb.transport.one_round import hold_round
from async_eplb.transport.renumbered import RenumberedControlGroup
from async_eplb.update.rank import Rank
from async_eplb.update.state import RankState


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank tells the others as a recovery begins.

    :param step: boundaries that it has passed
    :param generation: updates that it has begun
    :param attempt: number of its last recovery
    :param complete: whether it is done with that
    :param layer_generations: how often each layer has been replaced here, or will be for what was agreed
    """

    rank: int
    step: int
    generation: int
    attempt: int
    complete: bool
    layer_generations: tuple[int, ...]

    def to_row(self) -> list[int]:
        """Return the facts as integers."""
        return [self.rank, self.step, self.generation, self.attempt, int(self.complete), *self.layer_generations]

    @classmethod
    def from_row(cls, row: Sequence[int]) -> "Facts":
        """Read what :meth:`to_row` wrote."""
        rank, step, generation, attempt, complete, *layer_generations = row
        return cls(rank, step, generation, attempt, bool(complete), tuple(layer_generations))


async def recover(
    rank: Rank,
    state: RankState,
    attempts: Attempts,
    control: ControlGroup,
    source: WeightSource | None,
    *,
    outlook: Outlook,
) -> Recovery:
    """Bring survivors to the same layers; returns when all of them are there.

    :param state: of this rank, changed as far as the recovery comes, as are ``attempts``
    :param control: of the survivors
    :raises RankMismatch: if survivors are not in rank order in their transport
    :raises Unrecoverable: if one has committed a layer that another has no bytes of
    :raises PlacementDisagreement: if they serve different placements all the same
    :raises BrokenControlGroup: if one is lost meanwhile; recover without it
    """
    latest_here, generations = attempts.latest, _generations(rank, state)
    own = Facts(rank.number, outlook.step, outlook.generation, latest_here.number, latest_here.complete, generations)
    facts = [Facts.from_row(row) for row in await hold_round(control, own.to_row())]
    members = tuple(each.rank for each in facts)
    if sorted(set(members)) != list(members):
        raise RankMismatch(
            f"the transport's ranks are {list(members)} in the EP group; they must be in ascending order",
            expected=rank.number,
            actual=rank.number,
        )
    control = RenumberedControlGroup(control, members)
    latest = max(each.attempt for each in facts)
    _catch_up(rank, state, attempts, latest)
    goal = [max(column) for column in zip(*(each.layer_generations for each in facts), strict=True)]
    rolled = await roll_forward(rank, state, control, members, goal)
    gone = [number for number in range(rank.topology.num_ranks) if number not in members]
    remaining = without_ranks(state.placement, rank.topology, gone)
    if all(each.attempt == latest for each in facts) and not all(each.complete for each in facts):
        remaining = vacated(remaining, attempts.latest.homes)  # some ranks may have written there, others not
    attempt = Attempt(latest + 1, homes(remaining, rank.topology, gone), remaining)
    attempts.latest = replace(attempts.latest, proposed=attempt)
    digests = tuple(row[0] for row in await hold_round(control, [int.from_bytes(remaining.digest()[:8]) >> 1]))
    if len(set(digests)) > 1:
        raise PlacementDisagreement(
            f"ranks {list(members)} serve different placements: digests {list(digests)}",
            digests=digests,
            ranks=members,
        )
    _begin_attempt(rank, state, attempts, attempt)
    loaded = await fetch_lost(rank, state, attempts.latest.homes, control, source, step=outlook.step)
    attempts.latest = replace(attempts.latest, complete=True)
    return Recovery(
        ranks=members,
        generation=max(each.generation for each in facts),
        step=max(each.step for each in facts),
        placement=state.placement,
        rolled_forward=rolled,
        lost=remaining.unplaced(),
        missing=state.placement.unplaced(),
        loaded=loaded,
    )


def _generations(rank: Rank, state: RankState) -> tuple[int, ...]:
    """Return how often each layer has been replaced, or will be for what was agreed."""
    counts: list[int] = rank.expert_map.layer_generation.tolist()
    for row in () if state.failed_run is None else state.failed_run.progress.uncopied_rows:
        counts[row] += 1
    return tuple(counts)


def _catch_up(rank: Rank, state: RankState, attempts: Attempts, latest: int) -> None:
    """Begin the attempt that this rank has proposed too, if others know that all have; none of them has got further.

    A rank that knows has seen that this one proposed the same, and waits for it before it writes an expert.
    """
    proposed = attempts.latest.proposed
    if proposed is not None and proposed.number == latest:
        _begin_attempt(rank, state, attempts, proposed)


def _begin_attempt(rank: Rank, state: RankState, attempts: Attempts, attempt: Attempt) -> None:
    """Serve what all survivors have; slots where experts are loaded later may be empty by now."""
    placement = attempt.placement or state.placement
    for row in placement.changed_layers(state.placement):
        publish(rank, placement, row)
    state.placement = placement
    attempts.latest = attempt
