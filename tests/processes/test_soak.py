"""Updates beside forward passes, between real processes over gloo: no pass ever sees a torn layer."""

import pytest
from support.soak import Soak, soak_rank

from async_eplb.testing import run_world


@pytest.mark.parametrize(("num_ranks", "num_nodes", "num_updates"), [(2, 1, 6), (4, 2, 4), (8, 4, 2)])
def test_every_pass_sees_whole_layers(num_ranks: int, num_nodes: int, num_updates: int) -> None:
    """Bytes and maps agree in every pass on every rank, and layers are committed at the same boundary everywhere."""
    soak = Soak(num_nodes=num_nodes, num_updates=num_updates)
    results = run_world(soak_rank, num_ranks, soak)
    for result in results:
        assert (result.torn, result.disagreeing, result.other_logits, result.wrong_slots) == (0, 0, 0, [])
        assert result.commits == results[0].commits
        assert len(result.commits) == num_updates * soak.num_layers
        assert result.num_updates == num_updates
