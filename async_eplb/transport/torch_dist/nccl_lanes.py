"""NCCL for both hops of layers: a communicator and a stream for each, so that two layers can be under way at once."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from threading import Thread

from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb.device import Device, SideStream
from async_eplb.transport.exchange import Exchange
from async_eplb.transport.torch_dist.link import Finish, Launch
from async_eplb.transport.torch_dist.nccl import NcclLink, NcclOptions
from async_eplb.weights import ExpertWeights


class NcclLanes:
    """A communicator of all ranks for first hops, and one of a node's ranks for second hops.

    A second hop waits on the device for the work that its thread's current stream has at its launch, its layer's first
    hop, and nothing waits for it: the next layer's first hop runs beside it. NCCL allows operations of several
    communicators on a device at once if every rank launches them in the same order and the kernels of all of them fit
    on it together. The launch rule ensures the order, and a small :attr:`NcclOptions.max_ctas` of each that they fit.

    :param relay_peers: the other ranks of this node, if second hops are to be launched; without them there is one
        communicator, on which a second hop delays the next layer's first
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        device: Device,
        weights: ExpertWeights,
        *,
        relay_peers: Collection[int],
        timeout: timedelta,
        options: NcclOptions,
    ) -> None:
        def connect(lane: str, members: Sequence[int]) -> NcclLink:
            own = PrefixStore(lane, store)
            return NcclLink.connect(own, rank, members, device, weights, timeout=timeout, options=options)

        with device.transferring():
            self._links = [connect("first hops", range(num_ranks))]
            if relay_peers:
                node = sorted({rank, *relay_peers})
                self._side = SideStream(device.torch_device)
                with self._side.aside():
                    self._links.append(connect(f"second hops from {node[0]}", node))

    def prepare(self, exchange: Exchange) -> Launch:
        """Prepare an exchange; second hops are launched on a stream of their own, behind the thread's current one."""
        if exchange.hop == 0 or len(self._links) == 1:
            return self._links[0].prepare(exchange)
        launch = self._links[1].prepare(exchange)

        def launch_aside() -> Finish:
            with self._side.aside():
                return launch()

        return launch_aside

    def abort(self) -> None:
        """Abort all communicators; kernels that wait for a peer end.

        All at once: aborting one frees memory, which waits for the kernels of the others.
        """
        first, *others = self._links
        threads = [Thread(target=link.abort, daemon=True) for link in others]
        for thread in threads:
            thread.start()
        first.abort()
        for thread in threads:
            thread.join()
