"""The agreement as tasks of the event loop see it: frozen values, replaced whole after each round and step."""

from dataclasses import dataclass

from async_eplb.agreement.protocol import Agreement
from async_eplb.errors import BrokenControlGroup, EplbError


@dataclass(frozen=True, slots=True)
class Outlook:
    """The agreement as the last round or step left it; replaced whole, so that any thread reads one moment of it.

    :param generation: number of the last update begun
    :param following: number of the one that begins next here
    :param agreed: waves that are staged everywhere
    :param launched: waves whose launch is agreed
    :param limit: waves of the update, fewer after a cancellation
    :param begun: all ranks have begun the update with equal inputs
    :param over: nothing is left to agree on
    :param void: the update has failed on all ranks, after all had begun it
    :param demanded: rebalances that some rank has demanded
    :param standing: this rank makes no steps at present
    :param step: boundaries passed
    :param lead: boundaries from the last one passed to a new fence
    :param held: why this rank must pass no boundary before it recovers; None if it may
    """

    generation: int
    following: int
    agreed: int
    launched: int
    limit: int
    begun: bool
    over: bool
    void: bool
    demanded: int
    standing: bool
    step: int
    lead: int
    held: EplbError | None

    @classmethod
    def of(cls, agreement: Agreement, held: EplbError | None) -> "Outlook":
        """Return an agreement's state at this moment."""
        update, boundaries = agreement.update, agreement.boundaries
        return cls(
            generation=agreement.generation,
            following=agreement.following,
            agreed=update.agreed,
            launched=update.launched,
            limit=update.limit,
            begun=update.begun,
            over=update.over,
            void=update.void,
            demanded=agreement.demanded,
            standing=boundaries.standing,
            step=boundaries.step,
            lead=agreement.lead.boundaries,
            held=held,
        )


@dataclass(frozen=True, slots=True)
class PeerFaults:
    """Faults of other ranks that ballots showed, or missing ballots; they end the running update, or all updates.

    :param error: what this rank found wrong in the ballots of the running update, or in its own steps
    :param lost: why there are no more rounds, if a rank did not answer
    :param gone: ranks that have closed, after which there are no more rounds
    :param failed: ranks whose update failed
    :param cancelled: ranks that cancelled it
    :param waiting_for: ranks that have not begun it yet
    :param in_doubt: ranks whose layers may differ from others', until all recover together
    """

    error: EplbError | None = None
    lost: BrokenControlGroup | None = None
    gone: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    cancelled: tuple[int, ...] = ()
    waiting_for: tuple[int, ...] = ()
    in_doubt: tuple[int, ...] = ()

    @property
    def no_more_rounds(self) -> str:
        """Why no round follows; empty if one does."""
        if self.lost is not None:
            return f"a rank was lost: {self.lost}"
        return f"ranks {list(self.gone)} have left" if self.gone else ""

    @property
    def no_more_updates(self) -> str:
        """Why no update can begin any more; empty if one can."""
        doubt = f"ranks {list(self.in_doubt)} are in doubt; recover(), on all ranks" if self.in_doubt else ""
        return self.no_more_rounds or doubt
