"""Items in bins, some of them in compartments: the fullest bin has as few as a maximum flow allows."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from support.updates import examples

from async_eplb.plan.balance import balanced


@dataclass(frozen=True)
class Capped:
    """Items of one layer, (first option, last, the one to begin with, whether it is capped); what bins hold besides."""

    bin_of: tuple[int, ...]
    items: tuple[tuple[int, int, int, bool], ...]
    load: tuple[int, ...]
    capped_load: tuple[int, ...]

    def chosen_bins(self) -> list[int]:
        """Return the bin of each item: capped items are balanced first, then all are."""
        first, last, start, capped = (np.array(column, dtype=np.intp) for column in zip(*self.items, strict=True))
        layer, bin_of = np.zeros_like(first), np.array(self.bin_of)
        load, capped_load, inner = np.array([self.load]), np.array([self.capped_load]), np.flatnonzero(capped)
        count = last - first + 1
        start[inner] = balanced(start[inner], first[inner], count[inner], layer[inner], bin_of, capped_load)
        chosen = balanced(start, first, count, layer, bin_of, load, capped == 1, capped_load)
        assert ((first <= chosen) & (chosen <= last)).all()
        return [self.bin_of[option] for option in chosen]

    def fit(self, cap: int, limit: int) -> bool:
        """Return whether no bin must hold more capped items than ``cap``, and more in all than ``limit``."""
        num_bins, count = len(self.load), len(self.items)
        inner, outer = 2 + count, 2 + count + num_bins  # nodes: source, sink, items, compartments, bins
        edges = [(inner + each, outer + each, cap - self.capped_load[each]) for each in range(num_bins)]
        edges += [(outer + each, 1, limit - self.load[each] - self.capped_load[each]) for each in range(num_bins)]
        for number, (first, last, _, capped) in enumerate(self.items):
            edges.append((0, 2 + number, 1))
            bins = set(self.bin_of[first : last + 1])
            edges += [(2 + number, (inner if capped else outer) + each, 1) for each in bins]
        tails, heads, capacities = np.array(edges, dtype=np.int32).T
        size = outer + num_bins
        network = csr_array((capacities, (tails, heads)), shape=(size, size))
        return capacities.min() >= 0 and int(maximum_flow(network, 0, 1).flow_value) == count


@st.composite
def capped_items(draw: st.DrawFn) -> Capped:
    """Draw few bins, and more items than they have options."""
    num_bins, num_options = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    option = st.integers(0, num_options - 1)
    item = st.builds(
        lambda one, start, other, capped: (*sorted((one, start, other)), capped), option, option, option, st.booleans()
    ).map(lambda item: (item[0], item[2], item[1], item[3]))
    counts = [draw(st.lists(st.integers(0, 3), min_size=num_bins, max_size=num_bins)) for _ in range(2)]
    bins = draw(st.lists(st.integers(0, num_bins - 1), min_size=num_options, max_size=num_options))
    return Capped(tuple(bins), tuple(draw(st.lists(item, min_size=1, max_size=12))), tuple(counts[0]), tuple(counts[1]))


FULL_COMPARTMENT = Capped(
    bin_of=(1, 2, 0, 0, 1, 1, 1),
    items=(
        *((0, 6, 3, True), (0, 4, 1, True), (2, 5, 3, True), (0, 5, 4, False), (0, 2, 0, True)),
        *((1, 2, 1, True), (0, 2, 0, True), (3, 3, 3, True), (1, 5, 3, False)),
    ),
    load=(3, 3, 1),
    capped_load=(0, 0, 1),
)
"""A bin over the limit is nearer to room than its compartment: what is in the compartment stays there."""
TAKEN_BACK = Capped(
    bin_of=(1, 0, 2, 2, 3, 3, 3, 3),
    items=((2, 7, 7, True), (1, 7, 1, True), (0, 6, 0, True), (3, 3, 3, False)),
    load=(1, 3, 0, 2),
    capped_load=(0, 0, 2, 2),
)
"""A bin over the limit has only capped items that can go."""
TOO_MUCH_AT_ONCE = Capped(
    bin_of=(0, 0, 1, 0, 0, 1, 0, 1),
    items=(
        (1, 3, 2, True),
        (1, 4, 1, False),
        (3, 3, 3, True),
        (2, 6, 2, True),
        (1, 7, 6, True),
        (4, 7, 4, True),
        (5, 6, 5, False),
        (2, 3, 3, True),
        (2, 3, 2, True),
    ),
    load=(3, 2),
    capped_load=(2, 2),
)
"""A capped item and another could leave a bin together, one of which is enough."""


@pytest.mark.timeout(60)  # a wrong chain of moves has no end
@examples
@example(FULL_COMPARTMENT)
@example(TAKEN_BACK)
@example(TOO_MUCH_AT_ONCE)
@given(capped_items())
def test_capped_items_fill_no_bin_more_than_they_must(problem: Capped) -> None:
    """Capped items, then all: the fullest bin is the optimum of a maximum flow."""
    bins = problem.chosen_bins()
    inner, outer = Counter(dict(enumerate(problem.capped_load))), Counter(dict(enumerate(problem.load)))
    inner.update(each for each, (*_, capped) in zip(bins, problem.items, strict=True) if capped)
    outer.update(each for each, (*_, capped) in zip(bins, problem.items, strict=True) if not capped)
    cap, limit = max(inner.values()), max((inner + outer).values(), default=0)
    assert problem.fit(cap, limit)
    assert not problem.fit(cap, limit - 1)
    assert not problem.fit(cap - 1, len(problem.items) + sum(problem.load) + sum(problem.capped_load))
