"""Descriptions of clusters: the links between their GPUs. Bandwidths are nominal, of one direction."""

from dataclasses import dataclass

from async_eplb.arguments import Flag, Real, Whole, settle
from async_eplb.errors import InvalidOptions

_GB = 1e9


@dataclass(frozen=True, slots=True)
class Link:
    """A link of a GPU, through which it sends and receives.

    :param bytes_per_s: of one direction
    :param latency_s: from posting a stage until its first byte arrives
    :param full_duplex: whether it sends and receives at that rate at once; else both share it
    :raises InvalidOptions: if a number is out of range
    """

    bytes_per_s: float
    latency_s: float
    full_duplex: bool = True

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, bytes_per_s=Real(above=True), latency_s=Real(), full_duplex=Flag())


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes of GPUs, with the links inside a node and between nodes.

    :param num_ranks_per_node: GPUs that share the fast link
    :param within: link of each GPU to the others of its node
    :param across: link of each GPU to other nodes
    :param node_bytes_per_s: what all GPUs of a node together send to other nodes, and receive, at most
    :param source: where the numbers are from; latencies are assumptions
    :raises InvalidOptions: if a number is out of range
    """

    num_ranks_per_node: int
    within: Link
    across: Link
    node_bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        settle(self, InvalidOptions, num_ranks_per_node=Whole(1), node_bytes_per_s=Real(above=True))


_NVLINK_4 = Link(450 * _GB, 10e-6)
_NVLINK_5 = Link(900 * _GB, 10e-6)
_PCIE_5 = Link(64 * _GB, 20e-6)
_NDR = Link(50 * _GB, 25e-6)

CLUSTERS = {
    "h100": Cluster(
        8, _NVLINK_4, _NDR, 400 * _GB, "NVIDIA DGX H100 data sheet: NVLink 900 GB/s both ways, 8 x 400 Gb/s InfiniBand"
    ),
    "h200": Cluster(
        8, _NVLINK_4, _NDR, 400 * _GB, "NVIDIA DGX H200 data sheet: NVLink 900 GB/s both ways, 8 x 400 Gb/s InfiniBand"
    ),
    "gb200": Cluster(
        72, _NVLINK_5, _NDR, 3600 * _GB, "NVIDIA GB200 NVL72 data sheet: NVLink 1.8 TB/s both ways; 400 Gb/s a GPU"
    ),
    "pcie": Cluster(
        8, _PCIE_5, _NDR, 100 * _GB, "PCIe 5.0 x16, 64 GB/s each way; assumed: two 400 Gb/s adapters for 8 GPUs"
    ),
}
