"""Expert parallelism's traffic: rows to the ranks of their experts and back, two all-to-alls a layer.

Every rank's buffers have the size that the busiest rank of the pass needs, so sizes are known without asking and a
rank without tokens takes part with empty ones. The same code runs over gloo and NCCL: the only call that communicates
is ``all_to_all_single``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows that arrived, and where the own ones went.

    :param rows: ``[ranks * capacity, hidden]``
    :param slots: int64 ``[ranks * capacity]``: the local slot that each row is for; -1 where there is no row
    :param places: int64 ``[tokens, top_k]``: the place of each own row in the returning buffer
    """

    rows: Tensor
    slots: Tensor
    places: Tensor


class TokenExchange:
    """Moves rows between the ranks of an EP group.

    :param group: the model's group
    :param num_local_physical_experts: slots of each rank
    """

    def __init__(self, group: ProcessGroup, num_local_physical_experts: int) -> None:
        self._group = group
        self._num_ranks = dist.get_world_size(group)
        self._num_slots = num_local_physical_experts

    def dispatch(self, rows: Tensor, physical: Tensor, capacity: int) -> Dispatched:
        """Send each row once for each of its physical experts.

        The local slot travels as one more column, counted from one, so that zero means no row.

        :param rows: float32 ``[tokens, hidden]``
        :param physical: int64 ``[tokens, top_k]``
        :param capacity: rows for each pair of ranks; at least ``tokens * top_k``, and equal on all ranks
        """
        target, slot = physical // self._num_slots, physical % self._num_slots
        one_hot = target.flatten()[:, None] == torch.arange(self._num_ranks, device=rows.device)
        earlier = one_hot.cumsum(0).gather(1, target.flatten()[:, None]) - 1
        places = target * capacity + earlier.view_as(target)
        outgoing = rows.new_zeros(self._num_ranks * capacity, rows.shape[1] + 1)
        for choice in range(physical.shape[1]):
            outgoing[places[:, choice], :-1] = rows
            outgoing[places[:, choice], -1] = slot[:, choice].to(rows.dtype) + 1
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self._group)
        return Dispatched(incoming[:, :-1], incoming[:, -1].long() - 1, places)

    def combine(self, results: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' results back; return the own ones, ``[tokens, top_k, hidden]``.

        :param results: ``[ranks * capacity, hidden]``, in the order of ``dispatched.rows``
        """
        returned = torch.empty_like(results)
        dist.all_to_all_single(returned, results, group=self._group)
        return returned[dispatched.places]


def gather_rows(group: ProcessGroup, row: Sequence[int]) -> list[list[int]]:
    """Return the integers that every rank gives, by rank. Blocks until all have.

    :param group: a group of CPUs
    """
    num_ranks = dist.get_world_size(group)
    given = torch.tensor(row, dtype=torch.int64).repeat(num_ranks, 1)
    gathered = torch.empty_like(given)
    dist.all_to_all_single(gathered, given, group=group)
    rows: list[list[int]] = gathered.tolist()
    return rows
