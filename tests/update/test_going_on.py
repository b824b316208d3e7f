"""After an update that failed, serving goes on, and so does the next update, unless a rank is in doubt."""

from functools import partial
from typing import Any

import anyio
import pytest
from support.helpers import MemoryRank, memory_world, on_all, together, two_placements, until, with_virtual_time

from async_eplb import EPTopology, ExpertPlacement, LayerCommit, MemoryTransport, UpdateOptions
from async_eplb.errors import BrokenTransport, ClosedUpdater, CommitFailed, UpdateAborted, UpdateNotBegun
from async_eplb.transport import LaunchRule, MemorySchedule

TOPOLOGY = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=3)
OPTIONS = UpdateOptions(transfer_timeout_s=0.2, control_timeout_s=0.5, progress_timeout_s=2.0, verify="checksum")

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """No machine is too slow to end in time."""
    return with_virtual_time(request.param)


async def serve(ranks: list[MemoryRank], new: ExpertPlacement) -> list[object]:
    """Update beside steps that all ranks make together; return how it ended on each."""
    handles = [rank.updater.begin(new) for rank in ranks]
    while not all(handle.done for handle in handles):
        await on_all(ranks, lambda u: u.step())
        await anyio.sleep(0.002)
    return await together([handle.wait for handle in handles])


@pytest.mark.parametrize("launch_rule", LaunchRule)
async def test_every_other_update_fails(launch_rule: LaunchRule) -> None:
    """Layers are the same on all ranks each time; steps pass, and each next update opens another transport."""
    placements = two_placements(TOPOLOGY, 4, num_experts=6)
    schedule = MemorySchedule(control_s=0.001, launch_rule=launch_rule)
    async with memory_world(placements[0], TOPOLOGY, schedule=schedule, options=OPTIONS) as ranks:
        for number in range(6):
            new = placements[(number + 1) % 2]
            if number % 2 == 0:
                assert not [end for end in await serve(ranks, new) if isinstance(end, Exception)]
                assert all(rank.updater.placement == new for rank in ranks)
            else:
                handles = [rank.updater.begin(new) for rank in ranks]
                await until(lambda: all(rank.updater.outlook.begun for rank in ranks))
                running = ranks[number % 3].updater.running
                assert running is not None
                running.failure.fail(OSError("no luck"))
                while not all(handle.done for handle in handles):
                    await on_all(ranks, lambda u: u.step())
                    await anyio.sleep(0.002)
                ends = await together([handle.wait for handle in handles])
                assert [type(end) for end in ends].count(OSError) == 1
            assert len({rank.updater.placement for rank in ranks}) == 1
            for rank in ranks:
                rank.assert_consistent()


async def test_a_rank_that_missed_an_update_takes_part_in_the_next() -> None:
    """Its own call was refused, say; the others give up, and all begin the same one afterwards."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=MemorySchedule(control_s=0.001), options=OPTIONS) as ranks:
        for _ in range(2):
            outcomes = await on_all(ranks[:2], lambda u: u.begin(new).wait())
            assert all(isinstance(each, UpdateNotBegun | UpdateAborted) for each in outcomes)
            assert any(isinstance(each, UpdateNotBegun) and each.ranks == (2,) for each in outcomes)
            await until(lambda: len({rank.updater.outlook.following for rank in ranks}) == 1)
        assert not [end for end in await serve(ranks, new) if isinstance(end, Exception)]
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_a_rank_that_missed_an_update_opens_the_same_transport_as_the_others() -> None:
    """The one before has broken the transport; the others have tried to replace it without the rank."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=MemorySchedule(control_s=0.001), options=OPTIONS) as ranks:
        handles = [rank.updater.begin(new) for rank in ranks]
        await until(lambda: all(rank.updater.outlook.begun for rank in ranks))
        ranks[0].transport.abort()
        while not all(handle.done for handle in handles):
            await on_all(ranks, lambda u: u.step())
            await anyio.sleep(0.002)
        for _ in range(2):
            outcomes = await on_all(ranks[:2], lambda u: u.begin(new).wait())
            assert any(isinstance(each, UpdateNotBegun) and each.ranks == (2,) for each in outcomes)
            await until(lambda: len({rank.updater.outlook.following for rank in ranks}) == 1)
        assert not [end for end in await serve(ranks, new) if isinstance(end, Exception)]
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_no_update_begins_while_a_rank_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is not copied on one rank: all are told, and all recover together."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=MemorySchedule(control_s=0.001), options=OPTIONS) as ranks:

        def fail(*_: object) -> None:
            raise OSError("no luck")

        with monkeypatch.context() as patch:
            patch.setattr(ranks[1].updater.expert_map, "publish", fail)
            outcomes = await on_all(ranks, lambda u: u.update(new))
        assert isinstance(outcomes[1], CommitFailed)
        await until(lambda: all(rank.updater.closed for rank in ranks))
        for rank in (ranks[0], ranks[2]):
            await rank.updater.step()
            assert "ranks [1] are in doubt" in rank.updater.closed
            with pytest.raises(ClosedUpdater):
                rank.updater.begin(new)
        with pytest.raises(CommitFailed):
            await ranks[1].updater.step()
        transports = MemoryTransport.world(3, MemorySchedule(control_s=0.001))
        await together([partial(rank.updater.recover, each) for rank, each in zip(ranks, transports, strict=True)])
        assert not [end for end in await on_all(ranks, lambda u: u.update(new)) if isinstance(end, Exception)]
        for rank in ranks:
            assert rank.updater.placement == new
            rank.assert_consistent()


async def test_the_handle_of_an_update_that_has_ended_cancels_no_other() -> None:
    """However late it is used."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=MemorySchedule(control_s=0.001)) as ranks:
        ended = [rank.updater.begin(new) for rank in ranks]
        while not all(handle.done for handle in ended):
            await on_all(ranks, lambda u: u.step())
            await anyio.sleep(0.002)
        handles = [rank.updater.begin(old) for rank in ranks]
        while not all(handle.done for handle in handles):
            ended[0].cancel()
            await on_all(ranks, lambda u: u.step())
            await anyio.sleep(0.002)
        assert not [end for end in await together([h.wait for h in handles]) if isinstance(end, Exception)]


async def test_a_transport_that_cannot_be_replaced_hurts_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store of its group is gone, say: serving goes on, and a recovery over another transport opens it again."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    async with memory_world(old, TOPOLOGY, schedule=MemorySchedule(control_s=0.001), options=OPTIONS) as ranks:

        def fail(*_: object) -> None:
            raise OSError("no store")

        monkeypatch.setattr(MemoryTransport, "replacement", fail)
        handles = [rank.updater.begin(new) for rank in ranks]
        await until(lambda: all(rank.updater.outlook.begun for rank in ranks))
        ranks[0].transport.abort()
        while not all(handle.done for handle in handles):
            await on_all(ranks, lambda u: u.step())
            await anyio.sleep(0.002)
        for rank in ranks:
            await rank.updater.step()
            with pytest.raises(BrokenTransport, match="no store"):
                rank.updater.begin(new)
        transports = MemoryTransport.world(3, MemorySchedule(control_s=0.001))
        await together([partial(rank.updater.recover, each) for rank, each in zip(ranks, transports, strict=True)])
        assert not [end for end in await on_all(ranks, lambda u: u.update(new)) if isinstance(end, Exception)]


async def test_an_interrupted_step_leaves_the_rank_in_doubt_and_nobody_waiting() -> None:
    """A signal's handler raises in the middle of a commit: what it has done is not known, and leaving ends."""
    old, new = two_placements(TOPOLOGY, 3, num_experts=6)
    interrupted = False

    def interrupt(commit: LayerCommit) -> None:
        if commit.layer == 1:
            raise KeyboardInterrupt

    hooks = [lambda _: None, interrupt, lambda _: None]
    with anyio.fail_after(30.0):
        schedule = MemorySchedule(control_s=0.001)
        async with memory_world(old, TOPOLOGY, schedule=schedule, options=OPTIONS, on_commit=hooks) as ranks:
            handles = [rank.updater.begin(new) for rank in ranks]
            while not interrupted:
                for rank in ranks:
                    try:
                        await rank.updater.step()
                    except KeyboardInterrupt:
                        interrupted = True
                await anyio.sleep(0.002)
            outcomes = await together([handle.wait for handle in handles])
            assert isinstance(outcomes[1], CommitFailed)
            with pytest.raises(CommitFailed):
                await ranks[1].updater.step()
            await until(lambda: all(rank.updater.closed for rank in ranks))
