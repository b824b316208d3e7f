"""What can be read of an updater at any time, from any thread."""

from async_eplb.agreement.outlook import Outlook
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.agreement.steps import Stepper
from async_eplb.device import Device
from async_eplb.event_loop import HomeLoop
from async_eplb.expert_map import ExpertMap
from async_eplb.options import UpdateOptions
from async_eplb.placement import ExpertPlacement
from async_eplb.staging import StagingBuffer
from async_eplb.topology import EPTopology
from async_eplb.transport.base import Transport
from async_eplb.update.calls import BoundaryCalls
from async_eplb.update.demands import RebalanceDemands
from async_eplb.update.rank import Rank
from async_eplb.update.run import UpdateRun
from async_eplb.update.session import Session
from async_eplb.update.summary import UpdaterStatistics


class UpdaterViews:
    """The parts of an updater, and what can be read of them.

    :param placement: that the live weights have now
    :param transport: an unused one
    """

    def __init__(self, rank: Rank, placement: ExpertPlacement, transport: Transport) -> None:
        self.run_id = transport.run_id
        """Names this updater's life in logs; equal on all its ranks."""
        agreement = Agreement(lead=rank.options.lead, max_step_skew=rank.options.max_step_skew)
        self._shared = SharedAgreement(agreement)
        self._session = Session(rank, placement, self._shared, transport)
        self.calls = BoundaryCalls(self._shared, self._session)
        """For a rebalancer: what it reads of the model is read at a boundary."""
        self._stepper = Stepper(
            self._shared,
            rank.logger,
            rank.number,
            self._session.execute,
            at_boundary=self.calls.make,
            passes=self._session.passes,
        )
        self.demands = RebalanceDemands(self._shared, lambda: self.closed, lambda: self.paused_now, self.home)
        """For a rebalancer: when all ranks make the next rebalance."""

    def __repr__(self) -> str:
        state = f"closed: {self.closed}" if self.closed else "updating" if self.running else "idle"
        name = f" {self.name!r}" if self.name else ""
        return f"<{type(self).__name__}{name} rank {self.rank} of {self.topology.num_ranks}, {state}>"

    @property
    def name(self) -> str | None:
        """Tells this updater from others of its group; None if it has no name."""
        return self._rank.name

    @property
    def _rank(self) -> Rank:
        """This rank and its parts; another whole one takes its place when weights are rebound."""
        return self._session.rank

    @property
    def options(self) -> UpdateOptions:
        """How this updater works."""
        return self._rank.options

    @property
    def topology(self) -> EPTopology:
        """Shape of the EP group."""
        return self._rank.topology

    @property
    def rank(self) -> int:
        """This process in the EP group."""
        return self._rank.number

    @property
    def expert_map(self) -> ExpertMap:
        """Published maps, which routers read; their addresses never change."""
        return self._rank.expert_map

    @property
    def device(self) -> Device:
        """Streams and events of the live weights."""
        return self._rank.device

    @property
    def placement(self) -> ExpertPlacement:
        """The placement that the live weights have, as far as committed."""
        return self._session.placement

    @property
    def paused_now(self) -> bool:
        """Whether this rank is inside :meth:`ExpertUpdater.paused`."""
        return self._stepper.standing_for == "paused"

    @property
    def closed(self) -> str:
        """Why no update can begin; empty if one can."""
        return self._session.closed

    @property
    def home(self) -> HomeLoop:
        """The event loop that it was entered in; only there may its coroutines run."""
        return self._session.life.home

    @property
    def running(self) -> UpdateRun | None:
        """The update under way, if there is one."""
        return self._session.running

    @property
    def failed(self) -> UpdateRun | None:
        """The last update, if it failed and must be recovered from; it keeps staging until then."""
        return self._session.state.failed_run

    @property
    def staging(self) -> tuple[StagingBuffer, ...]:
        """Staging buffers and their states."""
        return self._session.pool.buffers

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of device memory that this updater holds while it is open; known before it is entered.

        Staging, published maps and the verification column. What the transport needs comes on top: NCCL's own buffers,
        and up to 16 MiB for each of its communicators.
        """
        return self._session.pool.nbytes + self._rank.expert_map.nbytes + self._rank.verifier.nbytes

    @property
    def outlook(self) -> Outlook:
        """The agreement at this moment: what is agreed on, and how many boundaries this rank has passed."""
        return self._shared.outlook

    def statistics(self) -> UpdaterStatistics:
        """Return what this updater has done so far."""
        return self._session.statistics(self._stepper)
