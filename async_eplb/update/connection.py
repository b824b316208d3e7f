"""The transport of an updater: opened, replaced after a failure that broke it, and closed."""

from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.update.rank import Rank


class Connection:
    """The transport that moves a rank's weights, and the one whose control group holds the rounds.

    They are the same until an update fails: its transport is broken then, and the next update opens a replacement.

    :param transport: an unused one
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._of_rounds = transport
        self._broken: Transport | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether the transport replaces one that broke, and is not open yet."""
        return self._broken is not None

    async def open(self, rank: Rank) -> ControlGroup:
        """Open the transport for what this rank moves, with ranks of the same updater; return its control group."""
        transport = self.transport
        among_all = transport.num_ranks == rank.topology.num_ranks
        return await transport.open(
            rank.device,
            rank.workers,
            rank.weights,
            control_timeout_s=rank.options.control_timeout_s,
            open_timeout_s=rank.options.open_timeout_s,
            identity=None if self.transport is not self._of_rounds else rank.identity,  # a replacement is of the same
            relay_peers=rank.relay_peers if among_all else (),
        )

    def replace(self) -> str:
        """Have the next update open a replacement of the transport; all ranks do this after the same update.

        :returns: why it cannot be, such as that the store of its group is gone; else nothing
        """
        try:
            self._broken, self.transport = self.transport, self.transport.replacement()
        except Exception as error:  # noqa: BLE001 - the caller goes on serving
            return f"the transport of an update that failed cannot be replaced ({error}); recover() reopens it"
        return ""

    async def open_replacement(self, rank: Rank) -> None:
        """Open the transport if it is a replacement, unless that was done. Control rounds go on meanwhile."""
        broken, self._broken = self._broken, None
        if broken is not None:
            if broken is not self._of_rounds:
                await broken.aclose()
            await self.open(rank)

    async def rebind(self, rank: Rank) -> None:
        """Have the transport take the rank's weights; a replacement that is not open yet is opened with them."""
        if not self.is_replaced:
            await self.transport.rebind(rank.weights)

    def use(self, transport: Transport) -> None:
        """Go on with an open transport between the ranks that remain; the one before is closed."""
        self.transport = self._of_rounds = transport
        self._broken = None

    async def aclose(self) -> None:
        """Close all transports. Nothing may be under way."""
        for transport in {id(each): each for each in (self.transport, self._broken, self._of_rounds) if each}.values():
            await transport.aclose()
