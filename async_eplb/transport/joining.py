"""How a transport joins a torch.distributed group, and how its ranks come together when they open it."""

import threading
import uuid
from collections.abc import Collection
from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from async_eplb.device import Device
from async_eplb.errors import BrokenTransport, BusyTransport, EplbError
from async_eplb.groups import Membership, join
from async_eplb.transport.base import OPEN_TIMEOUT_S
from async_eplb.transport.control import GlooControlGroup
from async_eplb.transport.identity import Identity, require_one
from async_eplb.transport.meeting import meet
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Work, Workers


class Opening(NamedTuple):
    """What a transport is opened with; see :meth:`Transport.open`."""

    device: Device
    workers: Workers
    weights: ExpertWeights
    control_timeout_s: float
    open_timeout_s: float
    relay_peers: Collection[int]


class Member:
    """Base of the transports of a torch.distributed group: their rank, a control group, and being opened once."""

    def __init__(self, group: ProcessGroup | Membership | None) -> None:
        self.board = join(group, "transport")
        self._run_id = self.board.own.compare_set("run_id", "", uuid.uuid4().hex).decode()
        self._group_id = self.board.shared.compare_set("async_eplb/group_id", "", uuid.uuid4().hex).decode()
        self._state = "new"
        self._control: GlooControlGroup | None = None

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.board.rank

    @property
    def num_ranks(self) -> int:
        """Processes of the group."""
        return self.board.num_ranks

    @property
    def run_id(self) -> str:
        """Name of this run in logs: the first rank to join has drawn it."""
        return self._run_id

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and neither closed nor aborted."""
        return self._state == "open"

    async def open(
        self,
        device: Device,
        workers: Workers,
        weights: ExpertWeights,
        *,
        control_timeout_s: float,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        identity: Identity | None = None,
        relay_peers: Collection[int] = (),
    ) -> GlooControlGroup:
        """Wait for all ranks, compare what they open this for, and connect to them.

        :raises OpenTimeout: if a rank does not come in time
        :raises UpdaterMismatch: if ranks open it for different updaters, on every rank
        :raises BusyGroup: if such an updater is open on the group already, on every rank
        :raises BrokenTransport: if ranks that have come do not connect
        """
        if self._state != "new":
            raise BusyTransport(f"{self!r} was opened before; make one transport for each updater")
        self._state = "open"
        try:
            taken = identity is not None and not self._claim(identity.name)
            own = (identity or Identity()).to_json(taken=taken)
            which = f" for {identity.name!r}" if identity is not None and identity.name else ""
            await workers.run(Work.CONNECT, partial(self.board.say, which))
            require_one(await meet(workers, self.board, "open", own, timeout_s=open_timeout_s), self.rank)
            opening = Opening(device, workers, weights, control_timeout_s, open_timeout_s, relay_peers)
            return await workers.run(Work.CONNECT, partial(self._connect, opening))
        except EplbError:
            self._state = "broken"
            raise
        except (RuntimeError, TimeoutError) as error:
            self._state = "broken"
            raise BrokenTransport(f"rank {self.rank}: {self!r} cannot connect: {error}", rank=self.rank) from error

    def _connect(self, opening: Opening) -> GlooControlGroup:
        """Connect to ranks that have all come. Blocks."""
        raise NotImplementedError

    def _claim(self, name: str) -> bool:
        """Take an updater's name in the group; return whether it was free in this process."""
        with _CLAIMING:
            other = _UPDATERS.get((self._group_id, self.rank, name))
            if other is not None and other._state != "closed":  # noqa: SLF001 - of the same class
                return False
            _UPDATERS[self._group_id, self.rank, name] = self
            return True

    def _connect_control(self, opening: Opening) -> GlooControlGroup:
        """Connect the control group, whether the caller of ``open`` keeps it or not.

        It is kept until the transport is closed: one that is dropped takes its connections with it, and slower ranks
        may still be making theirs.
        """
        store = PrefixStore("control", self.board.own)
        self._control = GlooControlGroup(
            store, self.rank, self.num_ranks, opening.workers, timeout_s=opening.control_timeout_s
        )
        return self._control

    def _become_closed(self) -> None:
        """Become closed, and close the control group."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
        self._state = "closed"


_UPDATERS: WeakValueDictionary[tuple[str, int, str], Member] = WeakValueDictionary()
"""Transports of this process that updaters have: by group, rank and name. It is all that two updaters share."""
_CLAIMING = threading.Lock()
