"""Assign a rank's transfers to groups that are posted together, and find where its peers have what it receives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from async_eplb.plan.groups import busiest_ends, matching_groups
from async_eplb.plan.layer_plan import LayerPlan
from async_eplb.plan.update import UpdatePlan


@dataclass(frozen=True, slots=True)
class PostedLayer:
    """A rank's plan of one layer, and the group in which each of its transfers is posted.

    :param send_groups: group of each of the plan's sends
    :param relay_groups: group of each of its relays
    :param recv_groups: group of each of its receives
    :param recv_src_slots: slot of the sender of each receive that has the expert
    :param num_groups: groups of the layer, equal on all ranks
    :param num_first: groups of the first hop, equal on all ranks; those after them pass on what these bring
    :param num_busiest: transfers of the rank that sends most or receives most, equal on all ranks
    """

    plan: LayerPlan
    send_groups: tuple[int, ...]
    relay_groups: tuple[int, ...]
    recv_groups: tuple[int, ...]
    recv_src_slots: tuple[int, ...]
    num_groups: int
    num_first: int
    num_busiest: int


class PostedUpdate:
    """An update's plan for one rank, cut into groups.

    :param limits: transfers that a rank may take part in within a group, ``[layers]``
    """

    def __init__(self, plan: UpdatePlan, limits: Sequence[int]) -> None:
        self.plan = plan
        self.groups = groups = matching_groups(plan.transfers, np.asarray(limits, dtype=np.int64), plan.num_ranks)
        """Group of each transfer of all ranks within its layer: ``[transfers]``."""
        self._groups = [plan.columns_of(rows, groups[rows]) for rows in (plan.sent, plan.passed_on)]
        self._recvs = plan.columns_of(plan.received, groups[plan.received], plan.transfers.src_slot[plan.received])
        self._num_groups, self._num_first = (np.zeros(len(plan), dtype=np.int64) for _ in range(2))  # [layers]
        self._num_groups[plan.transfers.layer] = groups + 1  # the last of a layer is its largest
        first = ~plan.transfers.relayed  # [transfers]: of the first hop
        self._num_first[plan.transfers.layer[first]] = groups[first] + 1
        self._num_busiest = np.maximum(*busiest_ends(plan.transfers, len(plan), plan.num_ranks))  # [layers]

    def __getitem__(self, layer: int) -> PostedLayer:
        (send_groups,), (relay_groups,) = (columns.of(layer) for columns in self._groups)
        recv_groups, recv_src_slots = self._recvs.of(layer)
        return PostedLayer(
            plan=self.plan[layer],
            send_groups=tuple(send_groups),
            relay_groups=tuple(relay_groups),
            recv_groups=tuple(recv_groups),
            recv_src_slots=tuple(recv_src_slots),
            num_groups=int(self._num_groups[layer]),
            num_first=int(self._num_first[layer]),
            num_busiest=int(self._num_busiest[layer]),
        )
