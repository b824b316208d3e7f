"""The first usable transport: the same one on all ranks, and it is known why others were not taken."""

from functools import partial
from typing import Any

import anyio
import pytest
from support.groups import small_updater, stateless_groups
from support.helpers import together

from async_eplb import (
    CopyEngineTransport,
    ExpertPlacement,
    ExpertUpdater,
    HybridTransport,
    MemoryTransport,
    TorchDistTransport,
    open_first_usable,
)
from async_eplb.errors import InvalidOptions, NoUsableTransport, UpdaterMismatch
from async_eplb.testing import check_transport
from async_eplb.transport import FirstUsable

pytestmark = pytest.mark.anyio

NEW = ExpertPlacement.from_mapping([[3, 2, 1, 0]])


class Unlucky(TorchDistTransport):
    """A transport that cannot be opened on some ranks: before they have come, or after all are connected."""

    def __init__(self, group: Any, ranks: tuple[int, ...], *, late: bool = False) -> None:
        super().__init__(group)
        self._unlucky = ranks
        self._late = late

    async def open(self, *arguments: Any, **options: Any) -> Any:
        """Open it, unless this rank is unlucky."""
        control = await super().open(*arguments, **options) if self._late else None
        if self.rank in self._unlucky:
            raise OSError(f"no such device on rank {self.rank}")
        return control or await super().open(*arguments, **options)


async def update(updater: ExpertUpdater) -> ExpertPlacement:
    """Update; return the placement."""
    async with updater:
        await updater.update(NEW)
        return updater.placement


async def test_the_first_that_works_is_taken() -> None:
    """It keeps the contract, and tells why those before it were not taken."""
    chosen = [
        open_first_usable([CopyEngineTransport(group), HybridTransport(group), TorchDistTransport(group)])
        for group in stateless_groups(2)
    ]
    assert await together([partial(check_transport, each, num_exchanges=1) for each in chosen]) == [None] * 2
    for each in chosen:
        assert [text.split(": ")[:3] for text in each.refusals] == [
            [name, "ranks [0, 1]", "IpcUnavailable"] for name in ("CopyEngineTransport", "HybridTransport")
        ]
        assert "only CUDA devices share memory" in each.refusals[0]


@pytest.mark.parametrize("late", [False, True], ids=["before all have come", "when all are connected"])
async def test_one_that_fails_on_one_rank_is_skipped_by_all(late: bool) -> None:  # noqa: FBT001
    """Long before a deadline; what other ranks have half opened is closed."""
    groups = stateless_groups(3)
    unlucky = [Unlucky(group, (1,), late=late) for group in groups]
    updaters = [
        small_updater(open_first_usable([each, TorchDistTransport(group)]), open_timeout_s=30)
        for each, group in zip(unlucky, groups, strict=True)
    ]
    new = ExpertPlacement.from_mapping([[5, 4, 3, 2, 1, 0]])
    begun = anyio.current_time()

    async def live(updater: ExpertUpdater) -> object:
        async with updater:
            await updater.update(new)
            return updater.placement

    assert await together([partial(live, updater) for updater in updaters]) == [new] * 3
    assert anyio.current_time() - begun < 20
    assert [repr(each).rsplit(", ", 1)[-1] for each in unlucky] == ["closed>"] * 3


async def test_if_none_works_all_ranks_hear_why() -> None:
    """Of each candidate, and of each rank that could not open it."""
    updaters = [
        small_updater(open_first_usable([Unlucky(group, (0,)), Unlucky(group, (1,), late=True)]))
        for group in stateless_groups(2)
    ]
    outcomes = await together([partial(update, updater) for updater in updaters])
    for outcome in outcomes:
        assert isinstance(outcome, NoUsableTransport)
        first, second = outcome.refusals
        assert "OSError: no such device on rank 0" in first
        assert "OSError: no such device on rank 1" in second
        assert first in str(outcome)


async def test_ranks_with_different_updaters_are_told_so() -> None:
    """No other candidate would mend that."""
    updaters = [
        small_updater(open_first_usable([TorchDistTransport(group), TorchDistTransport(group)]), name=name)
        for group, name in zip(stateless_groups(2), ("target", "draft"), strict=True)
    ]
    outcomes = await together([partial(update, updater) for updater in updaters])
    assert [type(outcome) for outcome in outcomes] == [UpdaterMismatch] * 2


async def test_ranks_in_memory_choose_together() -> None:
    """Whatever kind of transport it is."""
    in_use, usable = MemoryTransport.world(2), MemoryTransport.world(2)
    owners = [small_updater(each) for each in in_use]
    async with owners[0], owners[1]:
        updaters = [small_updater(open_first_usable(pair)) for pair in zip(in_use, usable, strict=True)]
        assert await together([partial(update, updater) for updater in updaters]) == [NEW] * 2
        assert await together([partial(owner.update, NEW) for owner in owners]) != []
        assert [owner.placement for owner in owners] == [NEW] * 2  # what somebody else has open is left alone


async def test_a_choice_of_none_is_refused() -> None:
    """The error names the argument."""
    with pytest.raises(InvalidOptions) as caught:
        open_first_usable([])
    assert caught.value.option == "transports"


async def test_it_stands_for_the_first_until_it_is_opened() -> None:
    """An updater asks it for rank and run before that."""
    candidates = MemoryTransport.world(2)
    chosen = FirstUsable(candidates[1:])
    assert (chosen.rank, chosen.num_ranks, chosen.run_id) == (1, 2, candidates[1].run_id)
    assert repr(chosen) == "<FirstUsable: <MemoryTransport rank 1 of 2>>"
