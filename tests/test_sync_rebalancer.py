"""The background task without an event loop."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from support.helpers import TINY
from support.loads import local_group

from async_eplb import (
    EPTopology,
    ExpertLoad,
    ExpertPlacement,
    ExpertWeights,
    Global,
    GlooLoadGroup,
    LoadWindow,
    MemoryTransport,
    RebalanceOptions,
    Rebalancer,
    RebalanceTerms,
    SyncRebalancer,
    SyncUpdater,
    TorchDistTransport,
)
from async_eplb.errors import BusyUpdater, ClosedRebalancer, ClosedUpdater, RebalanceFailed
from async_eplb.policy import PlacementPolicy, Reason
from async_eplb.testing import WorldRank, run_world

PAIR = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=3)
ALONE = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=6)
OLD = ExpertPlacement.trivial(2, 6, 4)
TERMS = RebalanceTerms(expert_nbytes=100, link_bytes_per_s=1e9, layer_step_s=1e-3, horizon_steps=1000)
ON_DEMAND = RebalanceOptions(every_steps=None)


def broken(_load: ExpertLoad, _current: ExpertPlacement, _topology: EPTopology) -> ExpertPlacement:
    """Be a policy with a defect."""
    raise ZeroDivisionError("no luck")


@contextmanager
def serving(policy: PlacementPolicy, options: RebalanceOptions = ON_DEMAND) -> Iterator[SyncRebalancer]:
    """Serve one rank in a thread, and yield its rebalancer, which is not started yet."""
    window, done = LoadWindow(2, 4, 8), threading.Event()
    weights = ExpertWeights(TINY.weights(OLD, ALONE, 0))
    with SyncUpdater(weights, OLD, ALONE, rank=0, transport=MemoryTransport.world(1)[0]) as updater:

        def serve() -> None:
            while not done.wait(0.001):
                updater.step()
                for layer in range(2):
                    window.record(layer, torch.tensor([0, 1, 2, 3, 3, 3]))
                window.advance()

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield SyncRebalancer(updater, window, policy, group=local_group(), terms=TERMS, options=options)
        finally:
            done.set()
            server.join()


def demand_and_serve(world: WorldRank) -> tuple[bool, str, int, bool]:
    """Serve, demand from rank 0, and serve on until weights have moved."""
    window = LoadWindow(2, 4, 8)
    weights = ExpertWeights(TINY.weights(OLD, PAIR, world.rank))
    with SyncUpdater(weights, OLD, PAIR, rank=world.rank, transport=TorchDistTransport()) as updater:
        options = RebalanceOptions(every_steps=None)
        group = updater.call(GlooLoadGroup.open)
        with SyncRebalancer(updater, window, Global(), group=group, terms=TERMS, options=options) as rebalancer:
            for _ in range(8):
                serve_once(updater, window, done=True)
            demand = rebalancer.demand() if world.rank == 0 else None
            while not serve_once(updater, window, done=rebalancer.statistics().num_moved == 1):
                assert not rebalancer.statistics().failure
            if demand is not None:
                assert demand.wait().summary is not None
            statistics = rebalancer.statistics()
            assert statistics.running
        dist.barrier()
        return updater.placement != OLD, statistics.failure, statistics.num_moved, rebalancer.statistics().running


def serve_once(updater: SyncUpdater, window: LoadWindow, *, done: bool) -> bool:
    """Make a forward pass with all ranks, in which expert 3 is hot; return whether all are done."""
    updater.step()
    for layer in range(2):
        window.record(layer, torch.tensor([0, 1, 2, 3, 3, 3, 3, 3, 3]))
    window.advance()
    all_done = torch.tensor(int(done))
    dist.all_reduce(all_done, op=dist.ReduceOp.MIN)
    return bool(all_done)


def test_processes_rebalance_without_event_loops_of_their_own() -> None:
    """Over real sockets, with a load group that is opened by the updater's event loop; a demand comes from one rank."""
    assert run_world(demand_and_serve, 2) == [(True, "", 1, False)] * 2


def test_a_demand_is_made_in_the_background() -> None:
    """While another thread serves; what is balanced stays."""
    with serving(Global()) as rebalancer, rebalancer:
        demand = rebalancer.demand()
        assert demand.wait().decision.reason is Reason.BALANCED
        assert demand.done
        assert rebalancer.demand().wait().number == 2
        assert rebalancer.statistics().num_rebalances == 2
        assert rebalancer.options == ON_DEMAND
        with pytest.raises(BusyUpdater):
            rebalancer.start()


def test_what_ends_it_is_told() -> None:
    """Who waits gets it at once, who demands later gets the reason, statistics say it, and closing raises it once."""
    with serving(broken) as rebalancer:
        rebalancer.start()
        with pytest.raises(RebalanceFailed, match="no luck") as caught:
            rebalancer.demand().wait()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(ClosedRebalancer, match="ended with ZeroDivisionError"):
            rebalancer.demand().wait()
        assert rebalancer.statistics().failure == "ZeroDivisionError('no luck')"
        assert not rebalancer.statistics().running
        with pytest.raises(ZeroDivisionError, match="no luck"):
            rebalancer.close()
        rebalancer.close()
        rebalancer.start()
        assert rebalancer.statistics().failure == ""
        rebalancer.close()


def test_the_error_of_the_body_comes_first() -> None:
    """It says what had ended the rebalancer before."""
    with serving(broken) as rebalancer, pytest.raises(RebalanceFailed) as caught, rebalancer:
        rebalancer.demand().wait()
    assert "ZeroDivisionError" in caught.value.__notes__[0]


def test_a_rebalancer_that_is_closed_makes_no_rebalance() -> None:
    """Neither before it is started, nor after it is closed; it can be started again."""
    with serving(Global()) as rebalancer:
        with pytest.raises(ClosedRebalancer, match="not started"):
            rebalancer.demand().wait()
        for _ in range(2):
            with rebalancer:
                assert rebalancer.demand().wait().number
        with pytest.raises(ClosedRebalancer, match="was cancelled"):
            rebalancer.demand().wait()


def test_closing_ends_a_demand_that_waits() -> None:
    """Nobody waits for what never comes: here nobody steps any more."""
    options = RebalanceOptions(every_steps=None, cool_down_steps=10**9)
    with serving(Global(), options) as rebalancer:
        rebalancer.start()
        rebalancer.demand().wait()
        demand = rebalancer.demand()
        rebalancer.close()
        with pytest.raises(ClosedRebalancer):
            demand.wait()


def test_leaving_the_updater_ends_its_rebalancer() -> None:
    """Demands end, and what is called later is refused: nothing hangs."""
    with serving(Global()) as rebalancer:
        rebalancer.start()
        assert rebalancer.demand().wait().number == 1
    assert not rebalancer.statistics().running
    with pytest.raises(ClosedUpdater):
        rebalancer.demand()
    with pytest.raises(ClosedUpdater):
        rebalancer.close()
    with pytest.raises(ClosedUpdater):
        rebalancer.start()


def test_both_rebalancers_take_the_same() -> None:
    """But for the kind of updater."""
    plain, synchronous = (dict(signature(kind).parameters) for kind in (Rebalancer, SyncRebalancer))
    del plain["updater"], synchronous["updater"]
    assert synchronous == plain
