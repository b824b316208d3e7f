"""Decide whether a rebalance pays: which layers of a candidate placement to move to, if any, and by what estimate."""

from dataclasses import dataclass

import numpy as np

from async_eplb.arguments import Real, Whole, settle
from async_eplb.errors import InvalidOptions
from async_eplb.events.plain import shown
from async_eplb.events.schema import Reason, RebalanceEvaluated
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.policy.check import require_complete, require_same_kind
from async_eplb.policy.measure import balancedness, rank_costs, receives
from async_eplb.policy.objective import Objective, tokens
from async_eplb.topology import EPTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceTerms:
    """Terms by which the costs of a rebalance are weighed against its gain.

    :param expert_nbytes: of one expert of one layer
    :param link_bytes_per_s: what a rank receives in a second, over its slowest link
    :param layer_step_s: time that the most loaded rank computes the experts of one layer in one step now, in seconds;
        a lower peak is taken to shorten it in proportion
    :param horizon_steps: steps that the new placement is expected to serve
    :param slowdown: time that serving loses for each second of transfer; 1 if it stands still meanwhile
    :param min_payback: time that must be saved for each second lost
    :param balanced_at: layers with a balancedness of at least this stay as they are
    :raises InvalidOptions: if a number is out of range
    """

    expert_nbytes: int
    link_bytes_per_s: float
    layer_step_s: float
    horizon_steps: int
    slowdown: float = 1.0
    min_payback: float = 1.0
    balanced_at: float = 0.98

    def __post_init__(self) -> None:
        settle(
            self,
            InvalidOptions,
            expert_nbytes=Whole(1),
            link_bytes_per_s=Real(above=True),
            layer_step_s=Real(above=True),
            horizon_steps=Whole(1),
            slowdown=Real(),
            min_payback=Real(),
            balanced_at=Real(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceDecision:
    """The outcome of :func:`choose`: the placement to move to, and the estimate that led to it.

    :param placement: to move to; the current one if it does not pay
    :param reason: why
    :param layers: that change, in ascending order; of a rebalance that does not pay: that would have
    :param balancedness_before: of each layer, with the current placement
    :param balancedness_after: of each layer, with ``layers`` of the candidate
    :param num_receives: experts that ranks have to receive for ``layers``
    :param num_slots: of ``layers``
    :param received_nbytes: bytes of these experts
    :param transfer_s: time that the transfers take, one layer after another, in seconds
    :param saved_s_per_step: time that a step gets shorter, in seconds
    :param horizon_steps: steps that it is expected to get shorter for
    """

    placement: ExpertPlacement
    reason: Reason
    layers: tuple[int, ...]
    balancedness_before: tuple[float, ...]
    balancedness_after: tuple[float, ...]
    num_receives: int
    num_slots: int
    received_nbytes: int
    transfer_s: float
    saved_s_per_step: float
    horizon_steps: int

    @property
    def pays(self) -> bool:
        """Whether to rebalance."""
        return self.reason is Reason.PAYS

    def event(self, *, generation: int, rank: int, step: int, policy: object) -> RebalanceEvaluated:
        """Return the decision as it is logged.

        :param policy: that made the candidate; its ``repr`` names it
        """
        return RebalanceEvaluated(
            generation=generation,
            rank=rank,
            step=step,
            policy=shown(policy),
            pays=self.pays,
            reason=self.reason.value,
            num_layers=len(self.balancedness_before),
            num_changed_layers=len(self.layers),
            mean_balancedness_before=float(np.mean(self.balancedness_before)),
            mean_balancedness_after=float(np.mean(self.balancedness_after)),
            min_balancedness_before=min(self.balancedness_before),
            min_balancedness_after=min(self.balancedness_after),
            num_receives=self.num_receives,
            num_slots=self.num_slots,
            received_nbytes=self.received_nbytes,
            transfer_ms=self.transfer_s * 1e3,
            saved_ms_per_step=self.saved_s_per_step * 1e3,
            horizon_steps=self.horizon_steps,
        )


def choose(
    load: ExpertLoad,
    current: ExpertPlacement,
    candidate: ExpertPlacement,
    topology: EPTopology,
    terms: RebalanceTerms,
    *,
    objective: Objective = tokens,
) -> RebalanceDecision:
    """Decide which layers of a candidate to move to, and whether that pays.

    A layer stays as it is if it is balanced already, or if the candidate does not lower its peak. For the others, the
    time that steps get shorter over the horizon is weighed against the time that serving loses to the transfers, which
    take as long as the rank that receives most, layer by layer. The model is linear and meant to be on the safe side:
    it knows no faster links within a node, and no overlap but ``slowdown``.

    :raises InvalidLoad: if load and placement have different layers or experts
    :raises InvalidPlacement: if a placement does not fit the topology, or lacks an expert
    """
    require_complete(current, topology)
    require_same_kind(candidate, current, topology)
    before = balancedness(load, current, topology, objective)  # [layers]
    peak, new_peak = (
        rank_costs(load, p, topology, objective).max(axis=1) for p in (current, candidate)
    )  # both [layers]
    changed = np.isin(np.arange(current.num_layers), candidate.changed_layers(current))
    worse = before < terms.balanced_at
    moves = changed & worse & (new_peak < peak)  # [layers]
    layers = tuple(int(layer) for layer in np.flatnonzero(moves))
    placement = current.with_layers(candidate, layers)
    received = receives(current, placement, topology)  # [layers, ranks]
    saved = np.divide(peak - new_peak, peak, out=np.zeros(len(peak)), where=moves)  # [layers]: share of a layer's step
    saved_s_per_step = float(saved.sum()) * terms.layer_step_s
    transfer_s = float(received.max(axis=1).sum()) * terms.expert_nbytes / terms.link_bytes_per_s
    lost_s = transfer_s * terms.slowdown
    if layers:
        pays = saved_s_per_step * terms.horizon_steps > lost_s * terms.min_payback
        reason = Reason.PAYS if pays else Reason.DOES_NOT_PAY
    else:
        reason = Reason.NO_GAIN if worse.any() else Reason.BALANCED
    return RebalanceDecision(
        placement=placement if reason is Reason.PAYS else current,
        reason=reason,
        layers=layers,
        balancedness_before=tuple(before.tolist()),
        balancedness_after=tuple(balancedness(load, placement, topology, objective).tolist()),
        num_receives=int(received.sum()),
        num_slots=len(layers) * topology.num_physical_experts,
        received_nbytes=int(received.sum()) * terms.expert_nbytes,
        transfer_s=transfer_s,
        saved_s_per_step=saved_s_per_step,
        horizon_steps=terms.horizon_steps,
    )
