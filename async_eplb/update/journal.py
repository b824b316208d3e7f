"""Every event of an update is made here, and its totals are kept."""

from collections.abc import Iterable, Sequence
from typing import Any

from anyio import current_time

from async_eplb.agreement.ballot import Ballot
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import UpdateStalled
from async_eplb.events.emit import emit
from async_eplb.events.plain import shown
from async_eplb.events.schema import (
    Event,
    LayerCommitted,
    LayerDecided,
    LayerPlanned,
    LayerTransferred,
    UpdateFailed,
    UpdateFinished,
    UpdateInputsLogged,
    UpdateStarted,
)
from async_eplb.events.schema import UpdateStalled as UpdateStalledEvent
from async_eplb.plan import LayerPlan, PostedUpdate, SlotSource
from async_eplb.staging import StagingPool
from async_eplb.topology import EPTopology
from async_eplb.update.admission import Update
from async_eplb.update.layer import MOVING, LayerInFlight, PlannedLayer
from async_eplb.update.rank import Rank
from async_eplb.update.summary import Tally, UpdateSummary
from async_eplb.update.watchdog import Activity


class Journal:
    """Logs what happens to one update on one rank. Times are in seconds on the event loop's clock."""

    def __init__(self, rank: Rank, update: Update, shared: SharedAgreement) -> None:
        self._rank = rank
        self._update = update
        self._shared = shared
        self._stamp = {"generation": update.generation, "rank": rank.number}
        self._tally = Tally()
        self._last_staged_s = 0.0
        self._last_committed_s = 0.0
        self._posted: PostedUpdate | None = None

    def prepared(self, posted: PostedUpdate, began_s: float) -> None:
        """Note the plan of all layers; nothing is logged before all ranks have begun."""
        self._posted = posted
        self._last_staged_s = self._last_committed_s = began_s
        self._tally.plan_ms += _ms_since(began_s)

    def started(self, pool: StagingPool) -> None:
        """Log that the update has begun on all ranks."""
        rank, update, rows = self._rank, self._update, self._update.rows
        self._emit(
            UpdateStarted(
                **self._now(),
                mode=update.mode.value,
                num_ranks=rank.topology.num_ranks,
                num_nodes=rank.topology.num_nodes,
                num_layers=len(rows),
                num_unchanged_layers=update.old.num_layers - len(rows),
                staging_nbytes=pool.nbytes,
            )
        )
        if rank.options.log_inputs and self._posted is not None:
            self._emit(
                UpdateInputsLogged(
                    **self._now(),
                    num_ranks=rank.topology.num_ranks,
                    num_nodes=rank.topology.num_nodes,
                    num_ranks_per_node=rank.topology.num_ranks_per_node,
                    num_local_physical_experts=rank.topology.num_local_physical_experts,
                    weight_shapes={row: rank.weights.shapes(row) for row in rows},
                    staged_slots=self._posted.plan.staged_slot_counts,
                    layers=list(rows),
                    old_physical_to_logical_map=update.old.physical_to_logical_map[list(rows)].tolist(),
                    new_physical_to_logical_map=update.new.physical_to_logical_map[list(rows)].tolist(),
                )
            )

    def planned(self, planned: PlannedLayer, began_s: float) -> None:
        """Log that a layer's plan is ready."""
        duration_ms = _ms_since(began_s)
        self._tally.plan_ms += duration_ms
        plan, counts = planned.plan, planned.plan.source_counts
        self._emit(
            LayerPlanned(
                **self._now(),
                layer=planned.row,
                duration_ms=duration_ms,
                num_same_gpu=counts[SlotSource.SAME_GPU],
                num_free_rider=counts[SlotSource.FREE_RIDER],
                num_same_node=counts[SlotSource.SAME_NODE],
                num_cross_node=counts[SlotSource.CROSS_NODE],
                num_sends=len(plan.sends) + len(plan.relays),
            )
        )
        if self._rank.options.log_decisions:
            self._emit(
                LayerDecided(
                    **self._now(),
                    layer=planned.row,
                    slot_sources=[source.value for source in plan.slot_sources],
                    local_copies=[copy._asdict() for copy in plan.local_copies],
                    recvs=[recv._asdict() for recv in plan.recvs],
                    sends=[send._asdict() for send in plan.sends],
                    fan_outs=[fan_out._asdict() for fan_out in plan.fan_outs],
                    relays=[relay._asdict() for relay in plan.relays],
                )
            )

    def transferred(self, layer: LayerInFlight) -> None:
        """Log that a layer is staged. Where two layers moved at once, their time counts once, for the earlier one."""
        turn_s = max(layer.turn_s, self._last_staged_s)
        event = transfer_event(
            layer.planned.plan,
            self._rank.topology,
            self._rank.number,
            layer=layer.planned.row,
            generation=self._update.generation,
            step=self._shared.outlook.step,
            expert_nbytes=sum(self._rank.weights.slot_nbytes(layer.planned.row)),
            ms=_ms_since(turn_s),
        )
        self._tally.add_transfer(event)
        self._emit(event)
        layer.staged_s = self._last_staged_s = current_time()

    def commit_turn_s(self, began_s: float) -> float:
        """Return when a commit's turn came: when it began, or when the one before was done on the device."""
        return max(began_s, self._last_committed_s)

    def committed(self, layer: LayerInFlight, turn_s: float) -> LayerCommitted:
        """Log that a commit is done on the device."""
        counts = layer.planned.plan.source_counts
        moved = {source: count for source, count in counts.items() if count and source in MOVING}
        event = LayerCommitted(
            generation=self._update.generation,
            rank=self._rank.number,
            layer=layer.planned.row,
            step=layer.step,
            duration_ms=_ms_since(turn_s),
            copy_ms=layer.copy_ms,
            wait_ms=(turn_s - layer.staged_s) * 1e3,
            num_slots=sum(moved.values()),
            nbytes=layer.nbytes,
        )
        self._tally.commit_ms += event.duration_ms
        self._tally.wait_ms += event.wait_ms
        for source, count in moved.items():
            self._tally.nbytes_by_source[source] += layer.nbytes // event.num_slots * count
        self._emit(event)
        self._last_committed_s = current_time()
        return event

    def stalled(
        self, error: UpdateStalled, activities: Sequence[Activity], pool: StagingPool, ballots: Sequence[Ballot]
    ) -> None:
        """Log that a stage makes no progress, and what all stages and ranks do."""
        self._emit(
            UpdateStalledEvent(
                **self._now(),
                layer=error.layer,
                stage=error.stage,
                doing=error.doing,
                duration_ms=error.timeout_s * 1e3,
                stages=[str(activity) for activity in activities],
                buffers=[repr(buffer) for buffer in pool.buffers],
                rank_states=[ballot.describe() for ballot in ballots],
            )
        )

    def ended(self, error: Exception | None, committed_rows: Sequence[int], duration_ms: float) -> None:
        """Log how the update ended."""
        if error is not None:
            self._emit(
                UpdateFailed(
                    **self._now(),
                    duration_ms=duration_ms,
                    error=type(error).__name__,
                    error_message=shown(error, str),
                    committed_layers=list(committed_rows),
                )
            )
            return
        self._emit(
            UpdateFinished(
                **self._now(),
                num_layers=len(self._update.rows),
                duration_ms=duration_ms,
                overlap=self._tally.overlap(duration_ms),
                **self._tally.numbers(),
            )
        )

    def summary(self, duration_ms: float) -> UpdateSummary:
        """Return what the update did, after its end."""
        return UpdateSummary(
            generation=self._update.generation,
            layers=self._update.rows,
            num_unchanged_layers=self._update.new.num_layers - len(self._update.rows),
            duration_ms=duration_ms,
            overlap=self._tally.overlap(duration_ms),
            nbytes_by_source=dict(self._tally.nbytes_by_source),
            **self._tally.numbers(),
        )

    def _now(self) -> dict[str, Any]:
        return {**self._stamp, "step": self._shared.outlook.step}

    def _emit(self, event: Event) -> None:
        emit(self._rank.logger, event)


def _ms_since(began_s: float) -> float:
    return (current_time() - began_s) * 1e3


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
