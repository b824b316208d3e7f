"""Swaps: exchanges of the experts of two slots, one of them on the rank that costs most.

A move *fits* if it brings the most costly rank within the limit and takes no other rank over its own. It *helps* if it
lowers the sum of squared excess over the limit.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from async_eplb.policy.objective import BoolArray, IntArray

Costs = npt.NDArray[np.float32]
"""Relative to the limit. Half the memory of float64 is half the time; limits allow for the rounding."""

NO_SLOT = -1
RECEIVE = 4.0
"""Of moves that fit, one receive outweighs any difference in room, which is at most 1."""
LEAST_HELP = 1e-9
"""Squared excess that is worth a move."""
HALF_RECEIVE = 0.5
"""What a move without receives counts as when help is weighed: twice as good as one, not infinitely."""


@dataclass(frozen=True, slots=True)
class View:
    """The state of unfinished rows, each with the rank that costs most. The limit of each rank is 1.

    :param rows: which rows of the search ``[n]``
    :param experts: expert of each slot, the largest id where empty ``[n, physical]``
    :param cost: of each slot ``[n, physical]``
    :param pays: whether changing a slot takes a receive that is not paid yet ``[n, physical]``
    :param rank_cost: ``[n, ranks]``
    :param peak_rank: the rank that costs most ``[n]``
    :param budget: receives that are left ``[n]``
    """

    rows: IntArray
    experts: IntArray
    cost: Costs
    pays: BoolArray
    rank_cost: Costs
    peak_rank: IntArray
    budget: IntArray

    def __getitem__(self, index: IntArray) -> "View":
        return View(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def num_slots(self) -> int:
        """Slots of one rank."""
        return int(self.experts.shape[1] // self.rank_cost.shape[1])

    @property
    def peak(self) -> Costs:
        """Cost of the peak rank ``[n]``."""
        return self.rank_cost[np.arange(len(self.peak_rank)), self.peak_rank]

    @property
    def peak_slots(self) -> IntArray:
        """Slots of the peak rank ``[n, slots]``."""
        return np.asarray(self.peak_rank[:, None] * self.num_slots + np.arange(self.num_slots))

    @property
    def over(self) -> Costs:
        """Cost of each rank over the limit ``[n, ranks]``."""
        return self.rank_cost - np.float32(1)


@dataclass(slots=True)
class Moves:
    """A table with one move for each row, or none.

    :param receives: that it takes at most; infinite where there is no move ``[n]``
    :param value: what it was chosen by; 0 where there is no move ``[n]``
    :param slot: that changes ``[n]``
    :param other: slot to swap with, :data:`NO_SLOT` for a reassignment ``[n]``
    :param expert: that a reassignment puts into ``slot`` ``[n]``
    """

    receives: Costs
    value: Costs
    slot: IntArray
    other: IntArray
    expert: IntArray

    @classmethod
    def none(cls, num_rows: int) -> "Moves":
        """Return no move for each row."""
        value = np.zeros(num_rows, dtype=np.float32)
        slots = np.full(num_rows, NO_SLOT)
        return cls(value + np.float32(np.inf), value, slots, slots.copy(), slots.copy())

    def replace(self, index: IntArray, moves: "Moves", where: BoolArray) -> None:
        """Put ``moves`` into the rows ``index``, but only ``where`` that holds: all ``[len(index)]``."""
        for field in fields(self):
            getattr(self, field.name)[index[where]] = getattr(moves, field.name)[where]


def fitting_swaps(view: View) -> Moves:
    """Find the swap that fits with the fewest receives; of those, the one that leaves the partner most room.

    A partner with much room left can take from the next loaded rank through the same slot, which is received once.
    """
    slots = np.arange(len(view.rows))[:, None], view.peak_slots  # index of [n, slots of the peak rank]
    given = view.cost[slots]  # [n, slots of the peak rank]
    fee = view.pays * np.float32(RECEIVE)  # [n, physical]
    largest = view.cost - np.repeat(view.over, view.num_slots, axis=1)  # [n, physical]: most that it can take instead
    excess = (view.peak - np.float32(1))[:, None]  # [n, 1]
    # Of all pairs of a slot of the peak rank and another slot: [n, slots of the peak rank, physical].
    fits = (view.cost[:, None, :] <= (given - excess)[:, :, None]) & (largest[:, None, :] >= given[:, :, None])
    above_0 = np.float32(2 * RECEIVE + 1)  # so that every swap that fits is worth more than none
    value = (above_0 + largest - fee)[:, None, :] - (given + fee[slots])[:, :, None]
    value *= fits
    return _best(view, value)


def helping_swaps(view: View) -> Moves:
    """Find the swap that lowers the squared excess most for each receive."""
    slots = np.arange(len(view.rows))[:, None], view.peak_slots  # index of [n, slots of the peak rank]
    given = view.cost[slots]  # [n, slots of the peak rank]
    over = np.repeat(view.over, view.num_slots, axis=1)  # [n, physical]: of each slot's rank
    excess = (view.peak - np.float32(1))[:, None]  # [n, 1]
    # Of all pairs of a slot of the peak rank and another slot: [n, slots of the peak rank, physical].
    shift = given[:, :, None] - view.cost[:, None, :]
    saved = (squared(excess) + squared(over))[:, None, :]
    saved = saved - squared(excess[:, :, None] - shift) - squared(over[:, None, :] + shift)
    receives = view.pays[slots][:, :, None] + view.pays[:, None, :].astype(np.float32)
    elsewhere = np.arange(view.experts.shape[1]) // view.num_slots != view.peak_rank[:, None]  # [n, physical]
    helps = (saved > LEAST_HELP) & elsewhere[:, None, :]
    helps &= receives <= view.budget[:, None, None]
    return _best(view, saved / np.maximum(receives, HALF_RECEIVE) * helps)


def _best(view: View, value: Costs) -> Moves:
    """Return the swap of highest value in each row.

    :param value: 0 where there is none ``[n, slots of the peak rank, physical]``
    """
    rows = np.arange(len(value))
    given, other = np.divmod(value.reshape(len(value), -1).argmax(axis=1), value.shape[2])  # both [n]
    slot = view.peak_slots[rows, given]  # [n]
    receives = view.pays[rows, slot].astype(np.float32) + view.pays[rows, other]
    best = value[rows, given, other]
    found = (best > 0) & (receives <= view.budget)
    return Moves(np.where(found, receives, np.float32(np.inf)), best * found, slot, other, view.experts[rows, slot])


def squared(excess: Costs) -> Costs:
    """Return the square of what is above 0, and 0 elsewhere."""
    return np.square(np.maximum(excess, np.float32(0)))
