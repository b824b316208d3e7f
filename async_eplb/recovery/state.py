"""What a recovery did, and where it came to if it was interrupted."""

from dataclasses import dataclass, field

from async_eplb.placement import ExpertPlacement
from async_eplb.recovery.survivors import Home


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a recovery did on this rank; all but ``rolled_forward`` and ``loaded`` is the same on all ranks.

    :param ranks: ranks of the EP group that go on
    :param step: boundaries passed, by the rank that was ahead; the next is one more, on all ranks
    :param placement: what the survivors serve now; slots of ranks that are gone are empty
    :param rolled_forward: layers that a peer had committed, and this rank only now
    :param lost: layer → logical experts that no survivor held
    :param missing: layer → those of them that still nobody holds: without a source, with one that failed, or for
        want of slots
    :param loaded: layer → those that this rank has loaded from the source
    """

    ranks: tuple[int, ...]
    generation: int
    step: int
    placement: ExpertPlacement
    rolled_forward: tuple[int, ...] = ()
    lost: dict[int, tuple[int, ...]] = field(default_factory=dict)
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loaded: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where a recovery puts lost experts. Every rank knows this before any rank writes the first.

    :param number: of the recovery, equal on all ranks that took part in it
    :param placement: what all survivors have before lost experts are loaded; None before the first recovery
    :param complete: this rank is done with it
    :param proposed: the one that follows, if this rank has proposed it and does not know that all others have too
    """

    number: int = 0
    homes: tuple[Home, ...] = ()
    placement: ExpertPlacement | None = None
    complete: bool = False
    proposed: "Attempt | None" = None


@dataclass(slots=True)
class Attempts:
    """One rank's recoveries.

    :param latest: where the last one put lost experts, or began to
    """

    latest: Attempt = field(default_factory=Attempt)
