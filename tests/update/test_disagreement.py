"""Ranks that begin the same update with different inputs all hear of it, and nothing has changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import memory_world, on_all, together
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertUpdater, ExpertWeights, MemoryTransport, UpdateOptions
from async_eplb.errors import PlacementDisagreement
from async_eplb.staging import BufferSize
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.update.rank import Rank

TOPOLOGY = EPTopology(num_ranks=2, num_nodes=2, num_local_physical_experts=2)
OLD = ExpertPlacement.from_mapping([[0, 1, 2, 3]] * 2)
NEW = ExpertPlacement.from_mapping([[3, 2, 1, 0]] * 2)


def weights(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4,)) -> dict[int, list[Tensor]]:
    """Return zeros that each layer's slots hold."""
    return {row: [torch.zeros((2, *shape), dtype=dtype)] for row in range(2)}


def updater(rank: int, transport: MemoryTransport, **inputs: Any) -> ExpertUpdater:
    """Make the updater of a rank, with inputs that differ from the other's."""
    return ExpertUpdater(
        ExpertWeights(inputs.get("weights", weights())),
        inputs.get("placement", OLD),
        inputs.get("topology", TOPOLOGY),
        rank=rank,
        transport=transport,
        options=UpdateOptions(**inputs.get("options", {})),
        workers=ScheduledWorkers(),
    )


@pytest.mark.anyio
@pytest.mark.parametrize(
    "inputs",
    [
        {"new": ExpertPlacement.from_mapping([[3, 2, 0, 1]] * 2)},
        {"placement": ExpertPlacement.from_mapping([[0, 1, 3, 2]] * 2)},
        {"layers": [1]},
        {"topology": EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)},
        {"weights": weights(dtype=torch.int32)},
        {"weights": weights(shape=(2, 2))},
        {"options": {"verify": "canary"}},
        {"options": {"staging_depth": 3}},
        {"options": {"reserve_nbytes": 1 << 20}},
        {"options": {"operations_per_group": 7}},
    ],
    ids=str,
)
async def test_inputs_that_differ_are_refused_on_every_rank(inputs: dict[str, Any]) -> None:
    """Before a byte moves, and the error names the ranks."""
    one, other = MemoryTransport.world(2)
    async with updater(0, one) as first, updater(1, other, **inputs) as second:
        outcomes = await together(
            [
                lambda: first.update(NEW),
                lambda: second.update(inputs.get("new", NEW), layers=inputs.get("layers")),
            ]
        )
        assert [type(outcome) for outcome in outcomes] == [PlacementDisagreement] * 2
        assert {outcome.ranks for outcome in outcomes} == {(1,)}
        assert (first.placement, second.placement) == (OLD, inputs.get("placement", OLD))


@pytest.mark.anyio
async def test_numbers_of_other_types_are_no_difference() -> None:
    """Ranks agree on values, not on how a rank's program has written them (rule 23)."""
    one, other = MemoryTransport.world(2)
    inputs = {
        "placement": ExpertPlacement(np.asfortranarray([[0, 1, 2, 3]] * 2), np.int8(4)),  # type: ignore[arg-type]
        "topology": EPTopology(np.int64(2), torch.tensor(2), np.uint8(2)),  # type: ignore[arg-type]
        "options": {"staging_depth": np.int16(2), "operations_per_group": torch.tensor(256)},
    }
    new = ExpertPlacement(torch.tensor([[3, 2, 1, 0]] * 2), torch.tensor(4))  # type: ignore[arg-type]
    async with updater(0, one) as first, updater(1, other, **inputs) as second:
        outcomes = await together(
            [
                lambda: first.update(NEW, layers=[0, 1]),
                lambda: second.update(new, layers=torch.tensor([1, 0])),
            ]
        )
    assert [outcome.layers for outcome in outcomes] == [(0, 1)] * 2


@pytest.mark.anyio
async def test_the_error_names_those_who_differ_from_most() -> None:
    """Also if the first rank is one of them."""
    topology = EPTopology(num_ranks=3, num_nodes=1, num_local_physical_experts=2)
    old, new, other = (
        ExpertPlacement.from_mapping([row]) for row in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 2, 3, 4, 5])
    )
    async with memory_world(old, topology) as ranks:
        outcomes = await on_all(ranks, ExpertUpdater.update, (other, new, new))
        assert [outcome.ranks for outcome in outcomes] == [(0,)] * 3


class OtherBuffers(ExpertUpdater):
    """Has staging buffers that come from the same options and are larger all the same."""

    def _equipped(self, rank: Rank) -> Rank:
        return replace(rank, buffer_size=BufferSize(rank.buffer_size.slots_nbytes + 256))


@pytest.mark.anyio
async def test_ranks_have_buffers_of_one_size() -> None:
    """What fits on one rank fits on all."""
    one, other = MemoryTransport.world(2)
    second = OtherBuffers(ExpertWeights(weights()), OLD, TOPOLOGY, rank=1, transport=other, workers=ScheduledWorkers())
    async with updater(0, one) as first, second:
        outcomes = await together([lambda: first.update(NEW), lambda: second.update(NEW)])
        assert [type(outcome) for outcome in outcomes] == [PlacementDisagreement] * 2
