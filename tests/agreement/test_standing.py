"""What was agreed is committed at one boundary, also when ranks stand and an update has failed."""

from typing import Any

from anyio import current_time, fail_after
from support.helpers import MemoryRank, assert_same_layer, in_virtual_time, memory_world, together, until

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.errors import UpdateAborted
from async_eplb.transport import MemorySchedule

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
OLD, NEW = (ExpertPlacement.from_mapping([row] * 3) for row in ([0, 1, 2, 3], [1, 0, 3, 2]))
OPTIONS = UpdateOptions(
    lead=32, staging_depth=1, transfer_timeout_s=1.0, control_timeout_s=2.0, progress_timeout_s=20.0
)
SCHEDULE = MemorySchedule(control_s=0.01)


async def until_agreed(ranks: list[MemoryRank]) -> None:
    """Wait until a layer is to be committed at a boundary that is far ahead."""
    with fail_after(5.0):
        await until(lambda: all(rank.updater.outlook.agreed == 1 for rank in ranks))


@in_virtual_time
async def test_what_was_agreed_moves_forward_after_a_failure() -> None:
    """All ranks stand before the same boundary, and one fails: the agreed layer is committed there, on all of them."""
    async with memory_world(OLD, TOPOLOGY, schedule=SCHEDULE, options=OPTIONS) as ranks:
        handles = [rank.updater.begin(NEW) for rank in ranks]
        await until_agreed(ranks)
        start = current_time()
        run = ranks[1].updater.running
        assert run is not None
        run.failure.fail(OSError("no luck"))

        async def stand(rank: int) -> Any:
            async with ranks[rank].updater.idle():
                return await handles[rank].wait()

        outcomes = await together([lambda: stand(0), lambda: stand(1)])
        assert [type(outcome) for outcome in outcomes] == [UpdateAborted, OSError]
        assert current_time() - start < 1.0
        assert assert_same_layer(ranks, OLD) == 1
