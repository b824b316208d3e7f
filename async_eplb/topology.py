"""Ranks, nodes and slots: how physical experts are numbered over an EP group."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from async_eplb.arguments import DEADLINE_S, Whole, settle, take
from async_eplb.errors import InvalidTopology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class EPTopology:
    """The shape of an EP group.

    A physical expert is numbered ``rank * num_local_physical_experts + slot``; the ranks of a node are
    consecutive.

    :param num_ranks: processes of the EP group, each with one device
    :param num_nodes: nodes that they are on, equally many ranks on each; ranks of a node share a fast link
    :param num_local_physical_experts: slots of each rank
    :raises InvalidTopology: if a number is no whole one of at least 1, or the ranks do not divide over the nodes
    """

    num_ranks: int
    num_nodes: int
    num_local_physical_experts: int

    def __post_init__(self) -> None:
        settle(self, InvalidTopology, num_ranks=Whole(1), num_nodes=Whole(1), num_local_physical_experts=Whole(1))
        if self.num_ranks % self.num_nodes:
            raise InvalidTopology(
                f"{self.num_ranks} ranks do not divide over {self.num_nodes} nodes; "
                "every node needs the same number of ranks",
            )

    @classmethod
    def for_physical_experts(cls, num_physical_experts: int, *, num_ranks: int, num_nodes: int) -> "EPTopology":
        """Build the topology that spreads ``num_physical_experts`` evenly over the ranks.

        :raises InvalidTopology: if they do not divide over the ranks, or the ranks not over the nodes
        """
        num_ranks = take(num_ranks, Whole(1), "num_ranks", InvalidTopology)
        num_physical_experts = take(num_physical_experts, Whole(1), "num_physical_experts", InvalidTopology)
        if num_physical_experts % num_ranks:
            raise InvalidTopology(
                f"{num_physical_experts} physical experts do not divide over {num_ranks} ranks; "
                "every rank needs the same number of slots",
            )
        return cls(num_ranks, num_nodes, num_physical_experts // num_ranks)

    @classmethod
    def from_group(
        cls, group: "ProcessGroup | None", num_local_physical_experts: int, *, timeout_s: float = 300.0
    ) -> "EPTopology":
        """Find the nodes of a process group, and build its topology. Blocks; all ranks of the group call it together.

        Ranks are on one node if their processes are on one host: one kernel since one boot, whatever containers they
        are in. Where the ranks of a host are not consecutive, or hosts have different numbers of them, the topology
        is flat, that is of one node. All ranks get the same.

        :param group: the EP group, of any kind that transports take; the world if it is None
        :param num_local_physical_experts: slots of each rank
        :param timeout_s: how long to wait for the slowest rank, in seconds
        :raises InvalidGroup: if there is no group, or it has no store; :class:`NotAMember` if this process is not in it
        :raises OpenTimeout: if a rank does not come in time; it names all of these
        :raises InvalidTopology: if a number is out of range, before anything is waited for
        """
        from async_eplb.groups import gather, host_id, join  # noqa: PLC0415 - with torch, which topologies do without

        cls(1, 1, num_local_physical_experts)
        timeout_s = take(timeout_s, DEADLINE_S, "timeout_s", InvalidTopology)
        board = join(group, "topology")
        hosts = gather(board, "host", host_id(), timeout_s)
        return cls(len(hosts), num_nodes_of(hosts), num_local_physical_experts)

    @property
    def num_physical_experts(self) -> int:
        """Number of slots of all ranks together."""
        return self.num_ranks * self.num_local_physical_experts

    @property
    def num_ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.num_ranks // self.num_nodes

    def node_of(self, rank: int) -> int:
        """Return the node that a rank is on."""
        return rank // self.num_ranks_per_node

    def neighbours_of(self, rank: int) -> tuple[int, ...]:
        """Return the other ranks of a rank's node."""
        first = self.node_of(rank) * self.num_ranks_per_node
        return tuple(other for other in range(first, first + self.num_ranks_per_node) if other != rank)

    def rank_of(self, physical_expert: int) -> int:
        """Return the rank that holds a physical expert."""
        return physical_expert // self.num_local_physical_experts

    def slots_of(self, rank: int) -> slice:
        """Return the physical experts of a rank, as a slice of a layer's map ``[physical]``."""
        start = rank * self.num_local_physical_experts
        return slice(start, start + self.num_local_physical_experts)


def num_nodes_of(hosts: Sequence[str]) -> int:
    """Return on how many nodes ranks are; 1 where hosts do not make nodes of equally many consecutive ranks.

    :param hosts: what names the host of each rank, by rank
    """
    runs = [len(list(run)) for _, run in groupby(hosts)]
    return len(runs) if len(runs) == len(set(hosts)) and len(set(runs)) == 1 else 1
