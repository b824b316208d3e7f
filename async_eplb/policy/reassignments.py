"""Reassignments: a spare slot (empty, or of an expert with more replicas) is given to an expert of the peak rank.

That changes the cost of every rank that holds one of the two experts. Where a rank is changed in two ways at once, the
bad one alone is counted, so that a move that counts as fitting or helping really does.
"""

from dataclasses import dataclass, fields

import numpy as np

from async_eplb.policy.moves import HALF_RECEIVE, LEAST_HELP, NO_SLOT, RECEIVE, Costs, Moves, View, squared
from async_eplb.policy.objective import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """The cost of one replica of each expert, empty slots last: now, and with one replica more or fewer in the row.

    All are ``[rows of the search, experts + 1]``.
    """

    now: Costs
    with_more: Costs
    with_fewer: Costs


@dataclass(frozen=True, slots=True)
class SpareSlots:
    """The spare slots of each row, and the effects of taking their replica away. ``[n, spare]``, padded.

    :param slot: index of the slot in the row
    :param real: False for padding
    :param expert: that it holds
    :param rank: that it is on
    :param left: cost of its rank without it
    :param peak: cost of the peak rank without it
    :param worst: the most that any other rank than these two is then over the limit; -inf if none changes
    :param harm: squared excess that is added on those ranks
    """

    slot: IntArray
    real: BoolArray
    expert: IntArray
    rank: IntArray
    left: Costs
    peak: Costs
    worst: Costs
    harm: Costs

    @classmethod
    def of(cls, view: View, spare: BoolArray, costs: ExpertCosts) -> "SpareSlots":
        """Evaluate the slots that are ``spare``, ``[n, physical]``, in the order of their experts."""
        rows, at = np.arange(len(spare))[:, None], view.rows[:, None]  # [n, 1]
        empty = costs.now.shape[1] - 1
        grouped = np.where(spare, view.experts, empty + 1)  # [n, physical]: what is not spare sorts last
        slot = grouped.astype(np.int32).argsort(axis=1, kind="stable")[:, : spare.sum(axis=1).max(initial=0)]
        expert = grouped[rows, slot]  # [n, spare], like all that follow
        real = expert <= empty
        expert = np.minimum(expert, empty)
        rank = slot // view.num_slots
        on_peak = rank == view.peak_rank[:, None]
        rise = costs.with_fewer[at, expert] - costs.now[at, expert]
        alone = np.where(expert == empty, -1 - np.arange(slot.shape[1]), expert)  # empty slots are no peers of others
        twins, peers_on_peak, worst, harm = _effects(view, alone, rank, rise)
        left = view.rank_cost[rows, rank] - view.cost[rows, slot] + twins * rise
        peak = np.where(on_peak, left, view.peak[:, None] + peers_on_peak * rise)
        return cls(slot, real, expert, rank, left, peak, worst, harm)

    def __getitem__(self, index: IntArray) -> "SpareSlots":
        return SpareSlots(*(getattr(self, field.name)[index] for field in fields(self)))

    def harmless(self) -> "SpareSlots":
        """Return the slots whose loss takes no other rank over the limit."""
        keep = self.real & (self.worst <= 0)  # [n, spare]
        order = (~keep).argsort(axis=1, kind="stable")[:, : keep.sum(axis=1).max(initial=0)]
        rows = np.arange(len(order))[:, None]
        kept = {field.name: getattr(self, field.name)[rows, order] for field in fields(self)}
        return SpareSlots(**kept | {"real": keep[rows, order]})


def _effects(view: View, expert: IntArray, rank: IntArray, rise: Costs) -> tuple[Costs, Costs, Costs, Costs]:
    """Sum up the effects of losing a replica on its peers, the other replicas of its expert.

    :param expert: of each spare slot; equal ones are neighbours ``[n, spare]``
    :param rise: what each peer then costs more ``[n, spare]``
    :returns: peers on the slot's own rank, peers on the peak rank if that is another, ``worst`` and ``harm``, all
        ``[n, spare]``
    """
    shape = expert.shape
    # All pairs of a spare slot and a peer: those at distance 1 in the table, then at 2, until no expert has so many.
    pairs = []
    for distance in range(1, shape[1]):
        same = expert[:, distance:] == expert[:, :-distance]
        if not same.any():
            break
        late, early = slice(distance, None), slice(None, -distance)
        pairs += [(late, early, same), (early, late, same)]
    twins, peers_on_peak, harm = np.zeros((3, *shape), dtype=np.float32)  # each [n, spare]
    worst = np.full(shape, np.float32(-np.inf))
    for mine, peer, same in pairs:
        twins[:, mine] += same & (rank[:, mine] == rank[:, peer])
    on_peak = rank == view.peak_rank[:, None]
    over = view.over[np.arange(shape[0])[:, None], rank]
    # A rank with several replicas rises by each of them; its squared excess is divided among them, to be counted once.
    raised = over + rise * (twins + 1)
    added = (squared(raised) - squared(over)) / (twins + 1) * ~on_peak
    raised[on_peak] = -np.inf  # the peak rank is evaluated by itself
    for mine, peer, same in pairs:
        away = same & (rank[:, mine] != rank[:, peer])
        peers_on_peak[:, mine] += away & on_peak[:, peer]
        np.maximum(worst[:, mine], raised[:, peer], out=worst[:, mine], where=away)
        harm[:, mine] += away * added[:, peer]
    return twins, peers_on_peak, worst, harm


class Reassignments:
    """All reassignments of spare slots to the experts of the peak rank: ``[n, spare, taken]``.

    :param held: whether a rank held an expert before the search ``[rows of the search, ranks, experts + 1]``
    """

    def __init__(self, view: View, spares: SpareSlots, costs: ExpertCosts, held: BoolArray) -> None:
        rows, at = np.arange(len(view.rows))[:, None], view.rows[:, None]  # [n, 1]
        taken = view.experts[rows, view.peak_slots]  # [n, taken]: experts of the peak rank
        gained = costs.with_more[at, taken]  # [n, taken]: cost of the new replica
        relief = costs.now[at, taken] - gained  # [n, taken]: what each old replica costs less
        dropped = (taken[:, :, None] == taken[:, None, :]).sum(axis=2, dtype=np.float32) * relief
        self._view = view
        self._spares = spares
        self._taken = taken
        self._relief = relief
        # Cost of the peak rank after each move, and of the spare slot's rank if it is another: [n, spare, taken].
        self._peak = spares.peak[:, :, None] - dropped[:, None, :]
        self._on_peak = spares.rank == view.peak_rank[:, None]  # [n, spare]
        self._peak += self._on_peak[:, :, None] * gained[:, None, :]
        left = np.where(self._on_peak, np.float32(-np.inf), spares.left)
        self._rank = left[:, :, None] + gained[:, None, :]
        # A move that fills a slot which is received anyway takes none more, and may save that one: -1, 0 or 1.
        unheld = ~held[at[:, :, None], spares.rank[:, :, None], taken[:, None, :]]  # [n, spare, taken]
        empty = costs.now.shape[1] - 1
        paid = ~view.pays[rows, spares.slot] & (spares.expert != empty)  # [n, spare]
        self._receives = unheld.astype(np.float32) - paid[:, :, None]
        possible = spares.real[:, :, None] & (taken[:, None, :] != spares.expert[:, :, None])
        possible &= (taken != empty)[:, None, :]
        self._possible = possible & (self._receives <= view.budget[:, None, None])

    def fitting(self) -> Moves:
        """Find the reassignment that fits with the fewest receives; of those, one that leaves most room.

        The spare slots are all harmless.
        """
        highest = np.maximum(self._peak, self._rank)  # [n, spare, taken]
        fits = self._possible & (highest <= 1)
        return self._best((np.float32(RECEIVE + 2) - np.float32(RECEIVE) * self._receives - highest) * fits)

    def helping(self) -> Moves:
        """Find the reassignment that lowers the squared excess most for each receive."""
        view, spares = self._view, self._spares
        rows = np.arange(len(spares.slot))[:, None]
        excess = (view.peak - np.float32(1))[:, None, None]  # [n, 1, 1]
        holds = view.experts[:, None, :] == self._taken[:, :, None]  # [n, taken, physical]
        replicas = holds.reshape(*self._taken.shape, -1, view.num_slots).sum(axis=3, dtype=np.float32)
        # [n, taken, ranks], like ``replicas``: squared excess that ranks lose whose replicas of the expert cost less
        over = view.over[:, None, :]
        eased = squared(over) - squared(over - self._relief[:, :, None] * replicas)
        every_taken = np.arange(self._taken.shape[1])
        eased[rows, every_taken, view.peak_rank[:, None]] = 0.0  # the peak rank is evaluated by itself
        counted_twice = eased[rows[:, :, None], every_taken, spares.rank[:, :, None]]  # [n, spare, taken]
        before = squared(view.over[rows, spares.rank]) * ~self._on_peak - spares.harm  # [n, spare]
        # [n, spare, taken]: squared excess of the peak rank, the slot's rank and all others, before less after
        saved = squared(excess) + before[:, :, None] + eased.sum(axis=2)[:, None, :] - counted_twice
        saved = saved - squared(self._peak - np.float32(1)) - squared(self._rank - np.float32(1))
        highest = np.maximum(np.maximum(self._peak, self._rank) - np.float32(1), spares.worst[:, :, None])
        helps = self._possible & (saved > LEAST_HELP) & (highest < excess)
        return self._best(saved / np.maximum(self._receives, HALF_RECEIVE) * helps)

    def _best(self, value: Costs) -> Moves:
        """Return the move of highest value in each row.

        :param value: 0 where there is none ``[n, spare, taken]``
        """
        if value.size == 0:
            return Moves.none(len(value))
        rows = np.arange(len(value))
        spare, taken = np.divmod(value.reshape(len(value), -1).argmax(axis=1), value.shape[2])  # both [n]
        best = value[rows, spare, taken]
        return Moves(
            receives=np.where(best > 0, self._receives[rows, spare, taken], np.float32(np.inf)),
            value=best,
            slot=self._spares.slot[rows, spare],
            other=np.full(len(value), NO_SLOT),
            expert=self._taken[rows, taken],
        )
