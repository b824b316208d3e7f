"""NCCL for both hops of layers: a communicator and a stream for each, so that two layers can be under way at once."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb.device import Device, SideStream
from async_eplb.transport.base import Exchange
from async_eplb.transport.torch_dist.nccl import NcclLink, NcclOptions
from async_eplb.workers import Workers


class NcclLanes:
    """A communicator of all ranks for first hops, and one of a node's ranks for second hops.

    A second hop waits on the device for what its thread's current stream has at its launch, its layer's first hop, and
    nothing waits for it: the next layer's first hop runs beside it. NCCL allows operations of several communicators on
    a device at once if every rank launches them in the same order and the kernels of all of them fit on it together:
    the order of launches sees to the one, a small :attr:`NcclOptions.max_ctas`, which each of them has, to the other.

    :param relay_peers: the other ranks of this node, if second hops are to be launched; without them there is one
        communicator, on which a second hop delays the next layer's first
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        device: Device,
        workers: Workers,
        *,
        relay_peers: Collection[int],
        timeout: timedelta,
        options: NcclOptions,
    ) -> None:
        self.workers = workers

        def connect(lane: str, members: Sequence[int]) -> NcclLink:
            own = PrefixStore(lane, store)
            return NcclLink(own, rank, members, device, workers, timeout=timeout, options=options)

        self._links = [connect("first hops", range(num_ranks))]
        if relay_peers:
            node = sorted({rank, *relay_peers})
            self._links.append(connect(f"second hops from {node[0]}", node))
            self._side = SideStream(device.torch_device)

    def prepare(self, exchange: Exchange) -> None:
        """Do what an exchange needs before its launch, for the stream that it will be launched on."""
        if exchange.hop == 0 or len(self._links) == 1:
            self._links[0].prepare(exchange)
        else:
            with self._side.aside():
                self._links[1].prepare(exchange)

    def launch(self, exchange: Exchange) -> Callable[[float], None]:
        """Enqueue an exchange behind the current stream of this thread."""
        if exchange.hop == 0 or len(self._links) == 1:
            return self._links[0].launch(exchange)
        with self._side.aside():
            return self._links[1].launch(exchange)

    def abort(self) -> None:
        """Abort all communicators; kernels that wait for a peer end.

        All at once: aborting one frees memory, which waits for the kernels of the others.
        """
        with ThreadPoolExecutor(len(self._links)) as threads:
            for aborted in [threads.submit(link.abort) for link in self._links]:
                aborted.result()
