"""Checks of the ballots of one round: all are of the same update, and from ranks at about the same step."""

from collections.abc import Iterable, Sequence

from async_eplb.agreement.ballot import Ballot
from async_eplb.errors import GenerationMismatch, PlacementDisagreement, StepMismatch


def named(members: Sequence[int], places: Iterable[int]) -> tuple[int, ...]:
    """Return the ranks whose ballots are at these places.

    :param members: rank of each ballot; empty if ballots are from ranks 0 and up
    """
    return tuple(members[place] if members else place for place in places)


def require_same_update(ballots: Sequence[Ballot], generation: int, members: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks that have not begun update ``generation`` yet; that all others began the same one is checked.

    :raises GenerationMismatch: if a rank has begun a later one
    :raises PlacementDisagreement: if ranks began the same update with different inputs
    """
    # Agreement rule 4: a round counts only if all its ballots are of this update, with equal inputs.
    generations = tuple(ballot.generation for ballot in ballots)
    if max(generations) > generation:
        raise GenerationMismatch(
            f"ranks have begun updates {list(generations)}; every rank must begin every update, in the same order",
            generations=generations,
        )
    behind = named(members, (place for place, number in enumerate(generations) if number < generation))
    if behind:
        return behind
    digests = tuple(ballot.digest for ballot in ballots)
    ranks = named(members, differing_ranks(digests))
    if ranks:
        raise PlacementDisagreement(
            f"ranks {list(ranks)} began update {generation} with another placement, topology, weight layout, "
            "mode or options than the others; nothing was moved",
            digests=digests,
            ranks=ranks,
        )
    return ()


def require_same_steps(ballots: Sequence[Ballot], stood_before: int, max_step_skew: int) -> int:
    """Refuse ranks that skipped steps; return the most boundaries passed if all ranks stand, else 0.

    Ranks that all stand have passed the same boundaries, but a ballot may be from before its rank went on. The next one
    is not: its rank had seen how far the others had come when they gave theirs.

    :param stood_before: what the round before returned
    :raises StepMismatch: if ranks have passed different numbers of boundaries
    """
    steps = tuple(ballot.step for ballot in ballots)
    standing = all(ballot.standing for ballot in ballots)
    fell_behind = standing and min(steps) < stood_before
    if fell_behind or max(steps) - min(steps) > max_step_skew:
        raise StepMismatch(
            f"ranks have passed {list(steps)} step boundaries; every rank must call step() once for every forward "
            "pass, dummy passes included",
            steps=steps,
        )
    return max(steps) if standing else 0


def differing_ranks(digests: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks whose digest is not the most common one; of equally common ones, the first counts."""
    common = max(set(digests), key=lambda digest: (digests.count(digest), -digests.index(digest)))
    return tuple(rank for rank, digest in enumerate(digests) if digest != common)
