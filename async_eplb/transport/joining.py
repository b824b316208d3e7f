"""How a transport finds itself in its group, and keys of its own in the group's store."""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store

from async_eplb.errors import BrokenTransport


class Membership(NamedTuple):
    """One transport's place in a group.

    :param store: nobody else uses its keys
    """

    rank: int
    num_ranks: int
    store: Store


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
    return Membership(rank, dist.get_world_size(group), PrefixStore(f"async_eplb/transport/{number}", store))
