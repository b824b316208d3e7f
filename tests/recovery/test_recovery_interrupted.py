"""A recovery that is interrupted, however often and wherever, is taken up by the next one."""

from functools import partial
from itertools import product

import pytest
from support.helpers import TINY, MemoryRank, in_virtual_time, memory_world, on_all
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, Recovery, UpdateOptions
from async_eplb.errors import BrokenControlGroup
from async_eplb.transport import MemorySchedule, MemoryTransport

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=1, num_local_physical_experts=4)
OPTIONS = UpdateOptions(transfer_timeout_s=0.2, control_timeout_s=0.4)
NUM_LAYERS = 2
OLD = ExpertPlacement.from_mapping([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 6, 7]] * NUM_LAYERS)
"""The last rank alone holds two experts, and two ranks have room for all."""
NUM_ROUNDS = 4 + NUM_LAYERS
"""Of a recovery: facts, who can follow, placements, sources, and whether each layer was loaded."""


class TinySource:
    """Holds the tiny model."""

    def load(self, layer: int, logical_expert: int) -> list[Tensor]:
        """Return an expert's bytes."""
        return TINY.expert_bytes(layer, logical_expert)


async def recover(ranks: list[MemoryRank], lost: tuple[int, int] | None) -> list[object]:
    """Recover these ranks, one of which does not hear a round; return what became of each."""
    schedule = MemorySchedule(control_s=0.01, lost_results=frozenset({lost} if lost else ()))
    transports = MemoryTransport.world(len(ranks), schedule)
    return await on_all(ranks, partial(ExpertUpdater.recover, source=TinySource()), transports)


@pytest.mark.parametrize("survivors", [2, 3], ids=["then one more is lost", "then all are there"])
@in_virtual_time
async def test_a_recovery_that_was_interrupted_twice(survivors: int) -> None:
    """Ranks miss results of rounds in two recoveries: the third brings all to one placement, with all experts."""
    for first, second in product(range(NUM_ROUNDS), repeat=2):
        for deaf, deaf_again in product((0, -1), repeat=2):
            async with memory_world(OLD, TOPOLOGY, options=OPTIONS, schedule=MemorySchedule(control_s=0.01)) as ranks:
                outcomes = await recover(ranks[:3], (deaf % 3, first))
                assert isinstance(outcomes[deaf], BrokenControlGroup)
                left = ranks[:survivors]
                outcomes = await recover(left, (deaf_again % survivors, second))
                assert isinstance(outcomes[deaf_again], BrokenControlGroup)
                assert [type(outcome) for outcome in await recover(left, None)] == [Recovery] * survivors
                assert len({rank.updater.placement for rank in left}) == 1
                assert not left[0].updater.placement.unplaced()
                for rank in left:
                    rank.assert_consistent()
