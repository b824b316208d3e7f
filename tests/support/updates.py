"""Updates of a few layers, drawn at random, and what becomes of them: what the tests of planning share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from async_eplb import EPTopology, ExpertPlacement
from async_eplb.plan import LayerPlan, Planner, PostedUpdate, UpdatePlan, plan_update

PLANNERS = [Planner(sources) for sources in ("chunked", "balanced", "relayed")]


@dataclass(frozen=True)
class Update:
    """Two placements in which no expert is lost; slots may be empty."""

    topology: EPTopology
    old: ExpertPlacement
    new: ExpertPlacement

    def plans(self, planner: Planner | None = None) -> list[UpdatePlan]:
        """Return the plan of each rank."""
        return [
            plan_update(self.old, self.new, self.topology, rank, planner=planner)
            for rank in range(self.topology.num_ranks)
        ]

    def posted(self, planner: Planner, limit: int) -> list[PostedUpdate]:
        """Return how each rank posts its plan."""
        return [PostedUpdate(plan, [limit] * self.old.num_layers) for plan in self.plans(planner)]

    def rows(self, layer: int) -> tuple[list[int], list[int]]:
        """Return one layer's old and new map."""
        old, new = (p.physical_to_logical_map[layer].tolist() for p in (self.old, self.new))
        return old, new


@st.composite
def updates(draw: st.DrawFn, max_layers: int = 3) -> Update:
    """Draw an update of up to 16 ranks."""
    nodes, ranks_per_node, slots = (draw(st.integers(1, 4)) for _ in range(3))
    topology = EPTopology(nodes * ranks_per_node, nodes, slots)
    num_layers = draw(st.integers(1, max_layers))
    num_experts = draw(st.integers(1, topology.num_physical_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_update(rng, topology, num_layers, num_experts, share_kept=draw(st.sampled_from([0.0, 0.5, 0.9])))


def random_update(
    rng: np.random.Generator, topology: EPTopology, num_layers: int, num_experts: int, *, share_kept: float = 0.0
) -> Update:
    """Draw maps whose new row holds experts of its old one; ``share_kept`` of the slots keep theirs."""
    shape = (num_layers, topology.num_physical_experts)
    old = rng.integers(-1, num_experts, shape)
    new = np.array([rng.choice(np.append(row, -1), shape[1]) for row in old])
    new = np.where(rng.random(shape) < share_kept, old, new)
    placements = (ExpertPlacement.from_mapping(maps, num_experts) for maps in (old, new))
    return Update(topology, *placements)


def execute(update: Update, layer: int, plans: Sequence[LayerPlan]) -> npt.NDArray[np.int64]:
    """Return what each slot holds after all ranks have done what they planned: ``[ranks, slots]``."""
    live = np.array(update.rows(layer)[0]).reshape(len(plans), -1)
    staged = _staged(live, plans)
    result = live.copy()
    for rank, plan in enumerate(plans):
        for slot in plan.staged_slots:
            result[rank, slot] = staged[rank][slot]
        for fan_out in plan.fan_outs:
            result[rank, fan_out.dst_slot] = staged[rank][fan_out.staged_slot]
    return result


def _staged(live: npt.NDArray[np.int64], plans: Sequence[LayerPlan]) -> list[dict[int, int]]:
    """Return what is in each rank's staging when all sends, and then all relays, have arrived."""
    staged = [
        {copy.dst_slot: int(live[rank, copy.src_slot]) for copy in p.local_copies} for rank, p in enumerate(plans)
    ]

    def deliver(wire: dict[tuple[int, int, int], int]) -> None:
        for rank, plan in enumerate(plans):
            keys = {recv.dst_slot: (recv.src_rank, rank, recv.logical_expert) for recv in plan.recvs}
            staged[rank] |= {slot: wire[key] for slot, key in keys.items() if key in wire}

    ranks = list(enumerate(plans))
    deliver({(r, s.dst_rank, s.logical_expert): int(live[r, s.src_slot]) for r, plan in ranks for s in plan.sends})
    deliver({(r, s.dst_rank, s.logical_expert): staged[r][s.src_slot] for r, plan in ranks for s in plan.relays})
    return staged
