"""How a transport joins a torch.distributed group: its rank there, and keys of its own in the group's store."""

import uuid
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb.errors import BrokenTransport, BusyTransport
from async_eplb.transport.control import GlooControlGroup
from async_eplb.workers import Workers


class Membership(NamedTuple):
    """One transport's place in a group.

    :param store: nobody else uses its keys
    :param run_id: names the run in logs, equal on all ranks
    """

    rank: int
    num_ranks: int
    store: Store
    run_id: str


def join(group: ProcessGroup | None) -> Membership:
    """Join a group with a new transport; all its ranks make their transports in the same order.

    :param group: the world without it
    :raises BrokenTransport: if this process is not in the group
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise BrokenTransport("this process is not a member of the group", rank=-1)
    rank, store = dist.get_rank(group), group.get_group_store()
    number = store.add(f"async_eplb/transports/{rank}", 1)
    own = PrefixStore(f"async_eplb/transport/{number}", store)
    run_id = own.compare_set("run_id", "", uuid.uuid4().hex).decode()
    return Membership(rank, dist.get_world_size(group), own, run_id)


class Member:
    """Base of the transports of a torch.distributed group: their rank, a control group, and being opened once."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self._rank, self._num_ranks, self._store, self._run_id = join(group)
        self._state = "new"
        self._control: GlooControlGroup | None = None

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    @property
    def num_ranks(self) -> int:
        """Processes of the group."""
        return self._num_ranks

    @property
    def run_id(self) -> str:
        """Name of this run in logs: the first rank to join has drawn it."""
        return self._run_id

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and neither closed nor aborted."""
        return self._state == "open"

    def _become_open(self) -> None:
        """Become open.

        :raises BusyTransport: if it was opened before
        """
        if self._state != "new":
            raise BusyTransport(f"{self!r} was opened before; make one transport for each updater")
        self._state = "open"

    def _connect_control(self, workers: Workers, timeout_s: float) -> GlooControlGroup:
        """Connect the control group, whether the caller of ``open`` keeps it or not.

        It is kept until the transport is closed: one that is dropped takes its connections with it, and slower ranks
        may still be making theirs.
        """
        store = PrefixStore("control", self._store)
        self._control = GlooControlGroup(store, self._rank, self._num_ranks, workers, timeout_s=timeout_s)
        return self._control

    def _become_closed(self) -> None:
        """Become closed, and drop the control group."""
        self._control = None
        self._state = "closed"
