"""What an update has done so far on one rank: times of the stages, bytes by direction, peer, node and source."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import anyio

from async_eplb.events import LayerTransferred
from async_eplb.plan import LayerPlan, SlotSource
from async_eplb.topology import EPTopology

_SUMS = (
    "sent_nbytes_within_node",
    "sent_nbytes_across_nodes",
    "received_nbytes_within_node",
    "received_nbytes_across_nodes",
)


class Stopwatch:
    """Milliseconds on the event loop's clock.

    :param ahead_ms: what has gone by already
    """

    def __init__(self, ahead_ms: float = 0.0) -> None:
        self._start = anyio.current_time() - ahead_ms / 1e3

    def ms(self) -> float:
        """Return the time since construction, and what had gone by then."""
        return (anyio.current_time() - self._start) * 1e3


@dataclass(slots=True)
class Tally:
    """Totals of an update. Times are in milliseconds, of all layers together."""

    plan_ms: float = 0.0
    transfer_ms: float = 0.0
    wait_ms: float = 0.0
    commit_ms: float = 0.0
    sent_nbytes_within_node: int = 0
    sent_nbytes_across_nodes: int = 0
    received_nbytes_within_node: int = 0
    received_nbytes_across_nodes: int = 0
    nbytes_by_source: Counter[SlotSource] = field(default_factory=Counter)

    def overlap(self, duration_ms: float) -> float:
        """Return the time of the stages over the duration; 0 if there was no time."""
        return (self.plan_ms + self.transfer_ms + self.commit_ms) / duration_ms if duration_ms else 0.0

    def numbers(self) -> dict[str, Any]:
        """Return all totals by name."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "nbytes_by_source"}

    def add_transfer(self, event: LayerTransferred) -> None:
        """Add what a layer's transfer moved."""
        self.transfer_ms += event.duration_ms
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(event, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSummary:
    """What an update did, seen from one rank. Times are in milliseconds, of all layers together.

    :param overlap: time of the stages over the duration: 1 if one ran after another, 3 if all ran all the time
    :param nbytes_by_source: bytes written to live weights, by where they came from
    """

    generation: int
    layers: tuple[int, ...]
    num_unchanged_layers: int
    duration_ms: float
    plan_ms: float
    transfer_ms: float
    wait_ms: float
    commit_ms: float
    overlap: float
    nbytes_by_source: dict[SlotSource, int]
    sent_nbytes_within_node: int
    sent_nbytes_across_nodes: int
    received_nbytes_within_node: int
    received_nbytes_across_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdaterStatistics:
    """What an updater has done since it was made.

    :param generation: updates begun
    :param updating: whether one is running
    :param step: boundaries passed
    :param lead: boundaries from the last one passed to a new fence
    :param num_rounds: control rounds held
    :param num_fence_waits: steps that had to wait for a round
    :param fence_wait_ms: how long they waited together
    :param longest_step_ms: longest time inside ``step()`` so far, waits included
    """

    generation: int
    updating: bool
    num_updates_finished: int
    num_updates_failed: int
    num_layers_committed: int
    step: int
    lead: int
    num_rounds: int
    num_fence_waits: int
    fence_wait_ms: float
    longest_step_ms: float


def transfer_event(
    plan: LayerPlan,
    topology: EPTopology,
    rank: int,
    *,
    layer: int,
    generation: int,
    step: int,
    expert_nbytes: int,
    ms: float,
) -> LayerTransferred:
    """Return what a layer's transfer moved, per direction and by peer rank and node.

    :param expert_nbytes: bytes of one expert in all tensors of the layer
    """
    sent = _nbytes_by_rank([send.dst_rank for send in (*plan.sends, *plan.relays)], expert_nbytes)
    received = _nbytes_by_rank([recv.src_rank for recv in plan.recvs], expert_nbytes)
    sent_nodes, received_nodes = _by_node(sent, topology), _by_node(received, topology)
    sent_nbytes, received_nbytes = sum(sent.values()), sum(received.values())
    node = topology.node_of(rank)
    return LayerTransferred(
        generation=generation,
        rank=rank,
        layer=layer,
        step=step,
        duration_ms=ms,
        copied_nbytes=len(plan.local_copies) * expert_nbytes,
        sent_nbytes=sent_nbytes,
        sent_to_ranks=list(sent),
        sent_nbytes_by_rank=list(sent.values()),
        sent_nbytes_by_node=sent_nodes,
        sent_nbytes_within_node=sent_nodes[node],
        sent_nbytes_across_nodes=sent_nbytes - sent_nodes[node],
        received_nbytes=received_nbytes,
        received_from_ranks=list(received),
        received_nbytes_by_rank=list(received.values()),
        received_nbytes_by_node=received_nodes,
        received_nbytes_within_node=received_nodes[node],
        received_nbytes_across_nodes=received_nbytes - received_nodes[node],
    )


def _nbytes_by_rank(peers: Iterable[int], expert_nbytes: int) -> dict[int, int]:
    nbytes: dict[int, int] = {}
    for peer in sorted(peers):
        nbytes[peer] = nbytes.get(peer, 0) + expert_nbytes
    return nbytes


def _by_node(nbytes_by_rank: dict[int, int], topology: EPTopology) -> list[int]:
    nodes = [0] * topology.num_nodes
    ranks_per_node = topology.num_ranks_per_node
    for rank, nbytes in nbytes_by_rank.items():
        nodes[rank // ranks_per_node] += nbytes
    return nodes
