"""A recovery from its beginning to control rounds of the survivors: what ``ExpertUpdater.recover`` does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CancelScope

from async_eplb.agreement.shared import SharedAgreement
from async_eplb.errors import BusyTransport, ClosedUpdater, EplbError
from async_eplb.recovery.recover import recover
from async_eplb.recovery.state import Attempts, Recovery
from async_eplb.recovery.weight_source import WeightSource
from async_eplb.transport.base import Transport
from async_eplb.transport.renumbered import RenumberedControlGroup, RenumberedTransport
from async_eplb.update.rank import Rank
from async_eplb.update.session import Session


async def reopen(
    rank: Rank,
    session: Session,
    shared: SharedAgreement,
    attempts: Attempts,
    surviving_group: Transport,
    source: WeightSource | None,
) -> Recovery:
    """End what is under way, recover over another transport, and go on with it. Not cancelled.

    :param attempts: of this rank, changed as far as the recovery comes, also if it fails
    :param surviving_group: an unused transport between the survivors
    :raises EplbError: as :func:`recover`; no boundary passes then
    """
    with CancelScope(shield=True):
        state, num_ranks = session.state, rank.topology.num_ranks
        async with _holding_back(rank, shared, surviving_group):
            await session.disconnect()
            session.connection.use(surviving_group)
            control = await session.connection.open(rank)
            recovery = await recover(rank, state, attempts, control, source, outlook=shared.outlook)
        state.failed_run = None
        state.gone = tuple(number for number in range(num_ranks) if number not in recovery.ranks)
        shared.restart(recovery.ranks, generation=recovery.generation, step=recovery.step)
        session.connection.use(RenumberedTransport(surviving_group, recovery.ranks, num_ranks))
        await session.connect(RenumberedControlGroup(control, recovery.ranks))
    return recovery


@asynccontextmanager
async def _holding_back(rank: Rank, shared: SharedAgreement, surviving_group: Transport) -> AsyncIterator[None]:
    """After a failure inside, let no step pass: peers may have committed what this rank has not."""
    try:
        yield
    except BaseException as error:
        shared.hold(
            error if isinstance(error, EplbError) else ClosedUpdater(f"rank {rank.number} did not recover: {error!r}")
        )
        if not isinstance(error, BusyTransport):  # somebody else has it open
            await surviving_group.aclose()
        raise
