"""The transport of an updater: opened, replaced after a failure that broke it, and closed."""

from async_eplb.errors import BrokenTransport
from async_eplb.transport.base import ControlGroup, Transport
from async_eplb.update.rank import Rank


class Connection:
    """The transport that moves a rank's weights, and the one whose control group holds the rounds.

    They are the same until an update fails: its transport is broken then, and the next update opens a replacement.

    :param transport: an unused one
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.is_broken = False
        """Whether the next update opens a replacement; the same on all ranks that have seen the same updates."""
        self._of_rounds = transport
        self._spent: list[Transport] = []

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

    def replace(self, generation: int) -> None:
        """Put an unused transport in the place of the one that broke.

        :param generation: of the update that opens it, so that all ranks that begin it open the same one
        :raises BrokenTransport: if it cannot be replaced: the store of its group is gone, say
        """
        if self.transport is not self._of_rounds:
            self._spent.append(self.transport)
        try:
            self.transport = self._of_rounds.replacement(generation)
        except Exception as error:
            raise BrokenTransport(
                f"the transport of an update that failed cannot be replaced ({error}); recover() takes another one",
                rank=self.transport.rank,
            ) from error

    async def open_replacement(self, rank: Rank) -> None:
        """Open the replacement. Control rounds go on meanwhile."""
        await self._close_spent()
        await self.open(rank)

    async def _close_spent(self) -> None:
        while self._spent:
            await self._spent.pop().aclose()

    async def rebind(self, rank: Rank) -> None:
        """Have the transport take the rank's weights; a replacement that is not open yet is opened with them."""
        if not self.is_broken:
            await self.transport.rebind(rank.weights)

    def use(self, transport: Transport) -> None:
        """Go on with an open transport between the ranks that remain; the one before is closed."""
        self.transport = self._of_rounds = transport
        self.is_broken = False

    async def aclose(self) -> None:
        """Close all transports. Nothing may be under way."""
        await self._close_spent()
        if self.transport is not self._of_rounds:
            await self.transport.aclose()
        await self._of_rounds.aclose()
