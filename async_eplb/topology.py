"""Ranks, nodes and slots: how physical experts are numbered over an EP group."""

from dataclasses import dataclass

from async_eplb.errors import InvalidTopology


@dataclass(frozen=True, slots=True)
class EPTopology:
    """The shape of an EP group.

    A physical expert is numbered ``rank * num_local_physical_experts + slot``; the ranks of a node are
    consecutive.

    :param num_ranks: processes of the EP group, each with one device
    :param num_nodes: nodes that they are on, equally many ranks on each; ranks of a node share a fast link
    :param num_local_physical_experts: slots of each rank
    :raises InvalidTopology: if a number is not positive, or the ranks do not divide over the nodes
    """

    num_ranks: int
    num_nodes: int
    num_local_physical_experts: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_local_physical_experts"):
            if getattr(self, name) < 1:
                raise InvalidTopology(f"{name} is {getattr(self, name)}; it must be at least 1")
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
        if num_ranks < 1 or num_physical_experts % num_ranks:
            raise InvalidTopology(
                f"{num_physical_experts} physical experts do not divide over {num_ranks} ranks; "
                "every rank needs the same number of slots",
            )
        return cls(num_ranks, num_nodes, num_physical_experts // num_ranks)

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
