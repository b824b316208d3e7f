"""Maps that are published into an engine's own tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import TINY, memory_world, on_all, two_placements
from support.layouts import random_tables
from torch import Tensor
from torch._subclasses import FakeTensorMode

from async_eplb import (
    EPTopology,
    ExpertMap,
    ExpertPlacement,
    ExpertUpdater,
    ExpertWeights,
    LayerCommit,
    MapTables,
    MemoryTransport,
    SyncUpdater,
    UpdateOptions,
)
from async_eplb.errors import InvalidTable, MissingTable, TooManyReplicas
from async_eplb.testing.sample_model import random_placement

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=2)
PLACEMENT = ExpertPlacement.trivial(2, 8, 4)
SHAPES = {
    "physical_to_logical_map": (2, 8),
    "logical_to_all_physical_map": (2, 4, 5),
    "logical_replica_count": (2, 4),
    "logical_to_dispatch_physical_map": (2, 4),
}
"""Of the tables of ``PLACEMENT``."""


def zeros(dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Return an engine's tables."""
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_an_engines_tables_hold_what_made_ones_would(seed: int) -> None:
    """Of any dtype, width and layout, at construction and after updates; nothing beside them is written."""
    rng = np.random.default_rng(seed)
    old, new = (random_placement(rng, 3, 8, 4) for _ in range(2))
    memory, tables = random_tables(rng, old)
    published = ExpertMap(old, TOPOLOGY, rank=seed % 4, seed=7, tables=tables)
    addresses = [table.data_ptr() for table in tables.given().values()]
    for placement in (old, new):
        if placement is new:
            for layer in (2, 0, 1):
                published.publish(layer, published.staged(published.layer_maps(new, layer)))
        made = ExpertMap(placement, TOPOLOGY, rank=seed % 4, seed=7)
        for name, table in tables.given().items():
            assert getattr(published, name) is table
            padding = [0, table.shape[-1] - getattr(made, name).shape[-1]]
            expected = torch.nn.functional.pad(getattr(made, name), padding, value=-1)
            assert table.tolist() == expected.tolist()
    assert [table.data_ptr() for table in tables.given().values()] == addresses
    assert published.layer_generation.tolist() == [1, 1, 1]
    for table in tables.given().values():
        table.fill_(-7)
    assert all((each == -7).all() for each in memory)


def test_tables_that_nobody_asked_for_are_left_out() -> None:
    """They are neither computed, staged nor copied; who reads one all the same is told what to do."""
    replicas = torch.zeros(2, 4, 1024, dtype=torch.int32)
    published = ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=MapTables(logical_to_all_physical_map=replicas))
    maps = published.layer_maps(PLACEMENT, 0)
    assert maps.logical_to_dispatch_physical_map is None
    assert [(staged.shape, staged.dtype) for staged in published.staged(maps)] == [((4, 5), torch.int32)]
    assert len(published.published(0)) == 1
    assert published.nbytes == published.layer_generation.nbytes, "the engine's tensors are the engine's"
    with pytest.raises(MissingTable, match="no table physical_to_logical_map") as caught:
        _ = published.physical_to_logical_map
    assert caught.value.table == "physical_to_logical_map"
    assert published.max_replicas == 5
    nothing = ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=MapTables())
    nothing.publish(1, nothing.staged(nothing.layer_maps(PLACEMENT, 1)))
    assert nothing.layer_generation.tolist() == [0, 1]


def test_a_narrow_table_bounds_the_replicas() -> None:
    """It suffices as long as no expert has more; an option that asks for more is refused."""
    tables = MapTables(logical_to_all_physical_map=torch.zeros(2, 4, 2, dtype=torch.int64))
    published = ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=tables)
    assert published.max_replicas == 2
    with pytest.raises(TooManyReplicas):
        published.require_room(ExpertPlacement.from_mapping([[0, 0, 0, 1, 2, 3, 0, 0]] * 2))
    with pytest.raises(InvalidTable, match=r"must be \[2, 4, 3\] or wider"):
        ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=tables, max_replicas=3)


def freed(table: Tensor) -> Tensor:
    """Return a tensor whose memory is gone."""
    table.untyped_storage().resize_(0)
    return table


def fake(table: Tensor) -> Tensor:
    """Return a tensor of a subclass that keeps its elements elsewhere."""
    with FakeTensorMode():
        return torch.zeros(table.shape, dtype=table.dtype)


NO_TABLES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "numpy array": (lambda t: t.numpy(), "is of type ndarray"),
    "list": (lambda t: t.tolist(), "is of type list"),
    "a tensor that wraps": (fake, "has no memory of its own"),
    "sparse": (lambda t: t.to_sparse(), "is not dense"),
    "int16": (lambda t: t.short(), "is torch.int16"),
    "float": (lambda t: t.float(), "is torch.float32"),
    "bool": (lambda t: t.bool(), "is torch.bool"),
    "uint32": (lambda t: t.to(torch.uint32), "is torch.uint32"),
    "meta": (lambda t: t.to("meta"), "is on the meta device"),
    "a layer less": (lambda t: t[:1], r"must be \[2, 8\]$"),
    "a layer more": (lambda t: t.repeat(2, 1), r"must be \[2, 8\]$"),
    "narrow": (lambda t: t[:, :7], r"must be \[2, 8\]$"),
    "wide": (lambda t: t.repeat(1, 2), r"must be \[2, 8\]$"),
    "flat": (lambda t: t.flatten(), r"must be \[2, 8\]$"),
    "scalar": (lambda _: torch.tensor(0), r"must be \[2, 8\]$"),
    "other order": (lambda t: t.t().contiguous().t(), "the last must be 1"),
    "every second": (lambda t: t.repeat(1, 2)[:, ::2], "the last must be 1"),
    "expanded": (lambda t: t[:1].expand(2, 8), "share memory"),
    "overlapping": (lambda t: t.as_strided((2, 8), (4, 1)), "share memory"),
    "freed": (freed, "its storage was freed"),
}


@pytest.mark.parametrize("kind", NO_TABLES)
def test_what_cannot_be_published_into_is_refused_by_name(kind: str) -> None:
    """Before anything is written, with what is wrong."""
    change, message = NO_TABLES[kind]
    tables = zeros()
    tables["physical_to_logical_map"] = change(tables["physical_to_logical_map"])
    with pytest.raises(InvalidTable, match=message) as caught:
        ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=MapTables(**tables))
    assert caught.value.table == "physical_to_logical_map"
    assert not any(table.any() for name, table in tables.items() if name != "physical_to_logical_map")


def test_tables_share_no_memory() -> None:
    """Not even some rows; tables that lie side by side in one block are fine."""
    both = torch.zeros(2, 12, dtype=torch.int64)
    tables = {"physical_to_logical_map": both[:, :8], "logical_replica_count": both[:, 8:]}
    ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=MapTables(**tables))
    assert both.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 2, 2, 2, 2]] * 2
    tables["logical_replica_count"] = both[:, 7:11]
    with pytest.raises(InvalidTable, match="logical_replica_count share memory with rows of physical_to_logical_map"):
        ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=MapTables(**tables))


def test_only_map_tables_are_tables() -> None:
    """A dictionary of them is a typed error."""
    with pytest.raises(InvalidTable, match="MapTables"):
        ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=zeros())  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("maker", [True, False])
@pytest.mark.parametrize("updates", [True, False])
def test_inference_mode_does_not_matter(engine: bool, maker: bool, updates: bool) -> None:  # noqa: FBT001
    """Neither the engine's, nor that of who makes the map or publishes."""
    with torch.inference_mode(mode=engine):
        tables = MapTables(**zeros(torch.int32))
    for given_tables in (tables, None):
        with torch.inference_mode(mode=maker):
            published = ExpertMap(PLACEMENT, TOPOLOGY, rank=0, tables=given_tables)
        with torch.inference_mode(mode=updates):
            published.publish(0, published.staged(published.layer_maps(PLACEMENT, 0)))
        assert published.physical_to_logical_map.is_inference() == (engine and given_tables is not None)
        assert published.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("serving", [True, False])
async def test_an_update_publishes_into_an_engines_tables(serving: bool) -> None:  # noqa: FBT001
    """Rows that a hook sees on the host are those that are published, and are kept by whoever is told of them."""
    old, new = two_placements(TOPOLOGY, 3, 6)
    engines = [
        MapTables(
            physical_to_logical_map=torch.zeros(3, 8, dtype=torch.int64),
            logical_to_all_physical_map=torch.zeros(3, 6, 1024, dtype=torch.int32),
            logical_replica_count=torch.zeros(3, 6, dtype=torch.int32),
        )
        for _ in range(4)
    ]
    told: list[list[LayerCommit]] = [[] for _ in range(4)]
    hooks = [each.append for each in told]
    async with memory_world(old, TOPOLOGY, on_commit=hooks, tables=engines) as ranks:

        async def serve(updater: ExpertUpdater) -> None:
            handle = updater.begin(new)
            while not handle.done:
                await updater.step()
            await handle.wait()

        await on_all(ranks, serve) if serving else await on_all(ranks, ExpertUpdater.update, [new] * 4)
        for rank, tables, commits in zip(ranks, engines, told, strict=True):
            rank.assert_consistent()
            made = ExpertMap(new, TOPOLOGY, rank=rank.updater.rank)
            assert [commit.layer for commit in commits] == [0, 1, 2]
            assert all((commit.step > 0) == serving for commit in commits)
            for name, table in tables.given().items():
                width = getattr(made, name).shape[-1]
                assert table[..., :width].tolist() == getattr(made, name).tolist()
                rows = [getattr(commit.maps, name) for commit in commits]
                assert all(row.dtype is torch.int64 and not row.is_inference() for row in rows)
                assert torch.stack(rows).tolist() == getattr(made, name).tolist()
            assert [commit.maps.logical_to_dispatch_physical_map for commit in commits] == [None] * 3


def test_both_updaters_take_tables() -> None:
    """They refuse wrong ones when they are made."""
    weights = ExpertWeights(TINY.weights(PLACEMENT, TOPOLOGY, 0))
    for updater in (ExpertUpdater, SyncUpdater):
        transport = MemoryTransport.world(4)[0]
        tables = MapTables(logical_replica_count=torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(InvalidTable):
            updater(weights, PLACEMENT, TOPOLOGY, rank=0, transport=transport, tables=tables)
        tables = MapTables(logical_replica_count=torch.zeros(2, 4, dtype=torch.int64))
        made = updater(weights, PLACEMENT, TOPOLOGY, rank=0, transport=transport, tables=tables)
        assert made.expert_map.logical_replica_count.tolist() == [[2] * 4] * 2
    with pytest.raises(InvalidTable, match="or wider"):
        ExpertUpdater(
            weights,
            PLACEMENT,
            TOPOLOGY,
            rank=0,
            transport=MemoryTransport.world(4)[0],
            tables=MapTables(logical_to_all_physical_map=torch.zeros(2, 4, 3, dtype=torch.int64)),
            options=UpdateOptions(max_replicas=4),
        )
