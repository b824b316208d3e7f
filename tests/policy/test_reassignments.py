"""Reassignments of spare slots: what is computed of them against the state after each, one slot at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.updates import examples

from async_eplb.policy import activated_experts, tokens
from async_eplb.policy.moves import HALF_RECEIVE, Moves, View
from async_eplb.policy.objective import FloatArray
from async_eplb.policy.reassignments import ExpertCosts, Reassignments, SpareSlots

EMPTY = 0.0


def squared_excess(cost: float) -> float:
    """Return how far a cost is above the limit, which is 1, squared."""
    return max(cost - 1, 0.0) ** 2


@dataclass(frozen=True)
class State:
    """One row of a search: the expert of each slot, the largest id where empty, and the rate of each expert."""

    num_ranks: int
    experts: tuple[int, ...]
    rates: tuple[float, ...]
    objective: Callable[[FloatArray], FloatArray]

    @property
    def num_slots(self) -> int:
        """Slots of a rank."""
        return len(self.experts) // self.num_ranks

    def replicas(self, expert: int) -> int:
        """Count the replicas of an expert."""
        return self.experts.count(expert)

    def cost(self, expert: int, replicas: int) -> float:
        """Return the cost of one of so many replicas."""
        if expert == len(self.rates):
            return EMPTY
        return float(self.objective(np.array(self.rates[expert] / max(replicas, 1))))

    def rank_costs(self) -> list[float]:
        """Return the cost of each rank."""
        costs = [self.cost(expert, self.replicas(expert)) for expert in self.experts]
        return [sum(costs[self.num_slots * rank :][: self.num_slots]) for rank in range(self.num_ranks)]

    def with_slot(self, slot: int, expert: int) -> "State":
        """Return the state after a slot was given to another expert."""
        experts = (*self.experts[:slot], expert, *self.experts[slot + 1 :])
        return State(self.num_ranks, experts, self.rates, self.objective)

    def on_rank(self, rank: int, expert: int) -> int:
        """Count the replicas of an expert on a rank."""
        return self.experts[self.num_slots * rank :][: self.num_slots].count(expert)

    def scaled(self, limit: float) -> "State":
        """Return the state with the cost ``limit`` as 1."""
        objective = self.objective
        return State(self.num_ranks, self.experts, self.rates, lambda rates: objective(rates) / limit)


@dataclass(frozen=True)
class Problem:
    """A state whose most costly rank is over the limit, and what it is to the code under test."""

    state: State
    view: View
    costs: ExpertCosts
    spares: SpareSlots

    @classmethod
    def of(cls, state: State, budget: int) -> "Problem":
        """Compute the costs, and find the spare slots."""
        experts = range(len(state.rates) + 1)
        now, more, fewer = (
            np.array([[state.cost(e, max(state.replicas(e) + change, 1)) for e in experts]], dtype=np.float32)
            for change in (0, 1, -1)
        )
        of_slots = np.array([state.experts])
        rank_cost = np.array([state.rank_costs()], dtype=np.float32)
        view = View(
            rows=np.zeros(1, dtype=np.int64),
            experts=of_slots,
            cost=now[:, of_slots[0]],
            pays=of_slots != len(state.rates),
            rank_cost=rank_cost,
            peak_rank=rank_cost.argmax(axis=1),
            budget=np.array([budget]),
        )
        costs = ExpertCosts(now, more, fewer)
        spare = [expert == len(state.rates) or state.replicas(expert) > 1 for expert in state.experts]
        return cls(state, view, costs, SpareSlots.of(view, np.array([spare]), costs))

    @property
    def peak_rank(self) -> int:
        """The rank that costs most."""
        return int(self.view.peak_rank[0])

    def reassignments(self, spares: SpareSlots) -> Reassignments:
        """Return the reassignments; every rank held what it holds now."""
        state = self.state
        held = np.array(
            [[[state.on_rank(r, e) > 0 for e in range(len(state.rates) + 1)] for r in range(state.num_ranks)]]
        )
        held[:, :, -1] = True
        return Reassignments(self.view, spares, self.costs, held)

    def after(self, moves: Moves) -> State:
        """Return the state after the move that was found."""
        return self.state.with_slot(int(moves.slot[0]), int(moves.expert[0]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw ranks that hold few experts in many slots, so that several replicas of one are on a rank."""
    num_ranks, num_slots, num_experts = draw(st.integers(2, 4)), draw(st.integers(2, 4)), draw(st.integers(2, 5))
    physical = num_ranks * num_slots
    num_experts = min(num_experts, physical)
    others = draw(st.lists(st.integers(0, num_experts), min_size=physical, max_size=physical))
    slots = draw(st.permutations(range(physical)))
    for expert, slot in zip(range(num_experts), slots, strict=False):
        others[slot] = expert  # each has a replica
    rates = tuple(draw(st.lists(st.integers(1, 12).map(float), min_size=num_experts, max_size=num_experts)))
    state = State(num_ranks, tuple(others), rates, draw(st.sampled_from([tokens, lambda x: activated_experts(x / 4)])))
    costs = state.rank_costs()
    share = draw(st.sampled_from([0.05, 0.2, 0.5, 0.9]))
    limit = max(costs) * share + np.mean(costs) * (1 - share)
    return Problem.of(state.scaled(float(limit) * 0.99), draw(st.integers(0, 3)))


@examples
@given(problems())
def test_the_effects_of_losing_a_replica(problem: Problem) -> None:
    """On its own rank, on the peak rank, and on all others, each rank counted once however many replicas it has."""
    state, spares = problem.state, problem.spares
    before = state.rank_costs()
    for place in np.flatnonzero(spares.real[0]):
        slot, expert, rank = (int(column[0, place]) for column in (spares.slot, spares.expert, spares.rank))
        assert (state.experts[slot], slot // state.num_slots) == (expert, rank)
        after = state.with_slot(slot, len(state.rates)).rank_costs()
        assert abs(spares.left[0, place] - after[rank]) < 1e-4
        assert abs(spares.peak[0, place] - after[problem.peak_rank]) < 1e-4
        is_expert = expert < len(state.rates)
        others = [
            other
            for other in range(state.num_ranks)
            if is_expert and other not in (rank, problem.peak_rank) and state.on_rank(other, expert)
        ]
        harm = sum(squared_excess(after[other]) - squared_excess(before[other]) for other in others)
        assert abs(spares.harm[0, place] - harm) < 1e-3 * max(1, harm)
        worst = max((after[other] - 1 for other in others), default=-np.inf)
        assert spares.worst[0, place] == worst or abs(spares.worst[0, place] - worst) < 1e-4


def one_by_one(spares: SpareSlots) -> Iterator[SpareSlots]:
    """Yield the same slots, of which but one are as padding."""
    for place in np.flatnonzero(spares.real[0]):
        real = np.zeros_like(spares.real)
        real[0, place] = True
        yield replace(spares, real=real)


@examples
@given(problems())
def test_a_reassignment_that_fits_does(problem: Problem) -> None:
    """The peak rank is within the limit then, and no other rank is brought over it."""
    before = problem.state.rank_costs()
    for spares in one_by_one(problem.spares.harmless()):
        moves = problem.reassignments(spares).fitting()
        if np.isfinite(moves.receives[0]):
            assert moves.receives[0] <= problem.view.budget[0]
            after = problem.after(moves).rank_costs()
            assert after[problem.peak_rank] <= 1 + 1e-4
            assert all(new <= max(old, 1) + 1e-4 for old, new in zip(before, after, strict=True))


@settings(examples, max_examples=200)
@given(problems())
def test_a_reassignment_that_helps_does(problem: Problem) -> None:
    """By no less squared excess than it was chosen for, and no rank then costs what the peak rank did."""
    before = problem.state.rank_costs()
    for spares in one_by_one(problem.spares):
        moves = problem.reassignments(spares).helping()
        if np.isfinite(moves.receives[0]):
            assert moves.receives[0] <= problem.view.budget[0]
            after = problem.after(moves).rank_costs()
            promised = float(moves.value[0]) * max(float(moves.receives[0]), HALF_RECEIVE)
            assert sum(map(squared_excess, before)) - sum(map(squared_excess, after)) >= promised - 1e-4
            assert max(after) < max(before) + 1e-5
