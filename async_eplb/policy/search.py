"""Search locally for few moves that bring every rank within a limit, in many independent rows at once.

A row is a layer, or the part of a layer that one node holds. In every round each unfinished row takes its most costly
rank and makes one move for it:

- a *swap* exchanges the experts of two slots, and changes nothing but their two ranks;
- a *reassignment* gives a spare slot to an expert of that rank, and changes all ranks that hold one of the two.

The move that fits with the fewest receives is taken, a swap before a reassignment; where none fits, the one that helps
most. A slot whose expert had to be received anyway changes again for free, so that a chain of swaps through one slot
costs one receive a rank. Of equal moves the first in index order is taken: equal inputs give equal results.
"""

from dataclasses import fields

import numpy as np

from async_eplb.policy.moves import NO_SLOT, Moves, View, fitting_swaps, helping_swaps
from async_eplb.policy.objective import FloatArray, IntArray, Objective
from async_eplb.policy.reassignments import ExpertCosts, Reassignments, SpareSlots

ROUNDING = 1e-6
"""Ranks may end this much above their limit, relative to it."""


class Search:
    """The state of a search.

    :param held: the expert of each slot, int64 ``[rows, ranks, slots]``; the number of experts where empty
    :param start: the experts to start from, alike: those that are not held are received
    :param rate: tokens a step of each expert ``[rows, experts]``
    :param limit: what a rank of the row should cost at most, infinite to leave the row as it is ``[rows]``
    :param objective: from a replica's tokens a step to its cost
    :param budget: receives that each layer may take ``[layers]``; a layer is equally many rows side by side
    """

    def __init__(
        self,
        held: IntArray,
        start: IntArray,
        rate: FloatArray,
        limit: FloatArray,
        objective: Objective,
        budget: IntArray,
    ) -> None:
        rows, self._num_ranks, self._num_slots = held.shape
        self._experts = start.reshape(rows, -1).copy()  # [rows, physical]
        self._empty = rate.shape[1]
        self._rate = np.pad(rate, ((0, 0), (0, 1)))  # [rows, experts + 1], no tokens for empty slots
        self._scale = np.divide(
            1.0, limit, out=np.zeros(rows), where=limit > 0
        )  # [rows]: costs are shares of the limit
        self._objective = objective
        self._budget = budget.copy()  # [layers]: receives that are left
        self._layer = np.repeat(np.arange(len(budget)), rows // len(budget))  # [rows]
        # Rows of a layer share its budget: where it may run out, only the worst of them moves in a round.
        self._takes_turns = rows > len(budget) and bool((budget < rows * start[0].size // len(budget)).any())
        every_row = np.arange(rows)[:, None]
        rank = np.arange(self._experts.shape[1]) // self._num_slots  # [physical]
        self._held = np.zeros((rows, self._num_ranks, self._empty + 1), dtype=bool)  # [rows, ranks, experts + 1]
        self._held[every_row, rank, held.reshape(rows, -1)] = True
        self._held[:, :, self._empty] = True  # emptying a slot takes no receive
        self._fresh = ~self._held[every_row, rank, self._experts]  # [rows, physical]: slots whose expert is received
        np.subtract.at(self._budget, self._layer, self._fresh.sum(axis=1))
        self._replicas = np.zeros(self._rate.shape)  # [rows, experts + 1]
        np.add.at(self._replicas, (every_row, self._experts), 1)
        self._replicas[:, self._empty] = np.inf
        self._costs = self._costs_of(self._rate, self._replicas, self._scale[:, None])

    def run(self) -> IntArray:
        """Search until each row is within its limit, or no move helps it.

        :returns: the expert of each slot, int64 ``[rows, physical]``
        """
        searching = np.arange(len(self._experts))  # rows
        for _ in range(2 * self._experts.shape[1]):  # moves that only help may go on for long
            view = self._view(searching)
            searching = view.rows
            if len(searching) == 0:
                break
            turn = self._turn(view)
            moves = self._choose(view if len(turn) == len(searching) else view[turn])
            found = np.isfinite(moves.receives)
            self._make(searching[turn[found]], moves, np.flatnonzero(found))
            searching = np.delete(searching, turn[~found])
        return self._experts

    def _view(self, rows: IntArray) -> View:
        """Return the state of those rows that are above their limit."""
        experts = self._experts[rows]  # [rows, physical]
        cost = self._costs.now[rows[:, None], experts]  # [rows, physical]
        rank_cost = cost.reshape(len(rows), self._num_ranks, self._num_slots).sum(axis=2)  # [rows, ranks]
        above = np.flatnonzero(rank_cost.max(axis=1) > 1 + ROUNDING)
        rows, rank_cost, experts = rows[above], rank_cost[above], experts[above]
        return View(
            rows=rows,
            experts=experts,
            cost=cost[above],
            pays=~self._fresh[rows] & (experts != self._empty),
            rank_cost=rank_cost,
            peak_rank=rank_cost.argmax(axis=1),
            budget=self._budget[self._layer[rows]],
        )

    def _turn(self, view: View) -> IntArray:
        """Return the rows that move in this round: of rows that share a budget that may run out, the worst one.

        :returns: indices of the view's rows
        """
        if not self._takes_turns:
            return np.arange(len(view.rows))
        layer = self._layer[view.rows]  # [n]
        worst_first = np.lexsort((-view.peak, layer))  # [n]
        return np.asarray(worst_first[np.unique(layer[worst_first], return_index=True)[1]])

    def _choose(self, view: View) -> Moves:
        """Return one move for each row: the one that fits with the fewest receives, or that helps most."""
        moves = fitting_swaps(view)
        # Where no swap fits with one receive or none, a reassignment may do it with fewer.
        dear = np.flatnonzero(moves.receives > 1)
        if len(dear) == 0:
            return moves
        dear_view = view[dear]
        spare = self._replicas[dear_view.rows[:, None], dear_view.experts] > 1  # [dear, physical]
        spares = SpareSlots.of(dear_view, spare, self._costs)
        fitting = Reassignments(dear_view, spares.harmless(), self._costs, self._held).fitting()
        moves.replace(dear, fitting, fitting.receives < moves.receives[dear])
        # Where nothing fits, anything that helps is taken.
        stuck = np.flatnonzero(np.isinf(moves.receives[dear]))
        if len(stuck):
            stuck_view = dear_view[stuck]
            swaps = helping_swaps(stuck_view)
            helping = Reassignments(stuck_view, spares[stuck], self._costs, self._held).helping()
            moves.replace(dear[stuck], swaps, swaps.value > 0)
            moves.replace(dear[stuck], helping, helping.value > swaps.value)
        return moves

    def _make(self, rows: IntArray, moves: Moves, index: IntArray) -> None:
        """Make the moves ``index`` in ``rows``, and charge their receives to the budgets: both ``[made]``."""
        slot, other, expert = moves.slot[index], moves.other[index], moves.expert[index]
        swaps = other != NO_SLOT
        given = self._experts[rows, slot]
        self._put(rows[swaps], slot[swaps], self._experts[rows[swaps], other[swaps]])
        self._put(rows[swaps], other[swaps], given[swaps])
        rows, slot, given, expert = rows[~swaps], slot[~swaps], given[~swaps], expert[~swaps]
        self._put(rows, slot, expert)
        for changed, replicas in ((given, -1), (expert, 1)):
            self._replicas[rows, changed] += replicas
            costs = self._costs_of(self._rate[rows, changed], self._replicas[rows, changed], self._scale[rows])
            for field in fields(costs):
                getattr(self._costs, field.name)[rows, changed] = getattr(costs, field.name)

    def _put(self, rows: IntArray, slot: IntArray, expert: IntArray) -> None:
        """Put experts into slots. Receives are counted once a slot; twins on a rank may make that too many."""
        fresh = ~self._held[rows, slot // self._num_slots, expert]
        np.subtract.at(self._budget, self._layer[rows], fresh.astype(np.int64) - self._fresh[rows, slot])
        self._fresh[rows, slot] = fresh
        self._experts[rows, slot] = expert

    def _costs_of(self, rate: FloatArray, replicas: FloatArray, scale: FloatArray) -> ExpertCosts:
        """Return the cost of a replica relative to the limit, for arrays of any one shape."""
        counts = (replicas, replicas + 1, np.maximum(replicas - 1, 1))
        costs = (self._objective(rate / np.maximum(count, 1)) * scale for count in counts)
        return ExpertCosts(*(cost.astype(np.float32) for cost in costs))
