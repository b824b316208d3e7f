"""How a process finds the other ranks of a torch.distributed group of any kind: its rank, and keys of its own.

Ranks meet by leaving texts for each other. A store's own wait is not used: it locks the store for all threads of the
process until it ends, and does not say who is missing.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupMember, PrefixStore, Store

from async_eplb.errors import InvalidGroup, NotAMember, OpenTimeout

_NO_MEMBER: object = GroupMember.NON_GROUP_MEMBER
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOOK_S = 0.02
"""From one look for the texts of other ranks to the next."""


class Board(Protocol):
    """Where the ranks of a group leave texts for each other. A key is written once."""

    @property
    def rank(self) -> int:
        """This process in the group."""
        ...

    @property
    def num_ranks(self) -> int:
        """Processes of the group."""
        ...

    def put(self, key: str, text: str) -> None:
        """Leave a text."""
        ...

    def get(self, keys: Sequence[str]) -> list[str] | None:
        """Return the texts of all these keys, or None if one is not there yet."""
        ...

    def explain(self, missing: Sequence[int]) -> str:
        """Return what is known of ranks that did not come, as the end of a message."""
        ...


@dataclass(frozen=True, slots=True)
class Membership:
    """The :class:`Board` of one transport, or of another thing that all ranks of a group make together.

    :param kind: what is made
    :param number: of this one among all of its kind that this rank has made in the group, from 1
    :param own: keys that nobody else uses
    :param shared: keys of the whole group
    """

    kind: str
    number: int
    rank: int
    num_ranks: int
    own: Store
    shared: Store

    def part(self, name: str) -> "Membership":
        """Return the board of another thing, which belongs to this one; all ranks give it the same name."""
        return replace(self, own=PrefixStore(name, self.own))

    def put(self, key: str, text: str) -> None:
        """Leave a text for the ranks that have made the one of the same number."""
        with _answering(self.rank):
            self.own.set(key, text)

    def get(self, keys: Sequence[str]) -> list[str] | None:
        """Return the texts of all these keys, or None if one is not there yet."""
        with _answering(self.rank):
            if not self.own.check(list(keys)):
                return None
            return [self.own.get(key).decode() for key in keys]

    def say(self, what: str) -> None:
        """Tell all ranks of the group what this one waits in, in case that others wait elsewhere."""
        with _answering(self.rank):
            self.shared.set(f"{_counter(self.kind, self.rank)}/now", f"{self.kind} {self.number}{what}")

    def explain(self, missing: Sequence[int]) -> str:
        """Say how many of the kind the missing ranks have made, if not as many as this, and what they opened last."""
        facts = []
        with _answering(self.rank):
            here = self.shared.add(_counter(self.kind, self.rank), 0)
            for rank in missing:
                counter = _counter(self.kind, rank)
                made = self.shared.add(counter, 0)
                if made != here:
                    facts.append(f"rank {rank} has made {made}")
                if self.shared.check([f"{counter}/now"]):
                    facts.append(f"rank {rank} opened {self.shared.get(f'{counter}/now').decode()} last")
        if not facts:
            return ""
        order = "ranks make and open them in the same order"
        return f"; this is {self.kind} {self.number} of {here} here, and {', '.join(facts)}: {order}"


def join(group: ProcessGroup | Membership | None, kind: str) -> Membership:
    """Join a group with something that all its ranks make, in the same order.

    :param group: any object with ``rank()``, ``size()`` and ``get_group_store()``, known to torch's registry or not;
        the world without it; a place in a group is taken as it is
    :param kind: what is made, such as ``"transport"``
    :raises NotAMember: if this process is not in the group
    :raises InvalidGroup: if there is no group, or it has no store
    """
    if isinstance(group, Membership):
        return group
    found: Any = dist.group.WORLD if group is None else group
    if found is None:
        raise InvalidGroup(
            "there is no default process group: call torch.distributed.init_process_group, or pass a group"
        )
    if type(found) is type(_NO_MEMBER) and found == _NO_MEMBER:
        raise NotAMember("this process is not a member of the group")
    try:
        rank, num_ranks, shared = found.rank(), found.size(), found.get_group_store()
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _without_store(found, str(error)) from error
    if not isinstance(shared, Store):
        raise _without_store(found, f"its store is {shared!r}")
    if not 0 <= rank < num_ranks:
        raise NotAMember(f"this process is not a member of the group: its rank is {rank} of {num_ranks}")
    with _answering(rank):
        number = shared.add(_counter(kind, rank), 1)
        own = PrefixStore(f"async_eplb/{kind}/{number}", _apart(shared))
    return Membership(kind, number, rank, num_ranks, own, shared)


def gather(board: Board, what: str, text: str, timeout_s: float) -> list[str]:
    """Leave a text, and return those of all ranks, in rank order. Blocks.

    :param what: names the texts; once for each board
    :raises OpenTimeout: if a rank has left none in time; it names all of these
    """
    board.put(f"{what}/{board.rank}", text)
    keys = [f"{what}/{rank}" for rank in range(board.num_ranks)]
    deadline = time.monotonic() + timeout_s
    while (texts := board.get(keys)) is None:
        if time.monotonic() > deadline:
            raise late(board, what, timeout_s)
        time.sleep(LOOK_S)
    return texts


def late(board: Board, what: str, timeout_s: float) -> OpenTimeout:
    """Return the error that names the ranks which have left no text."""
    missing = tuple(rank for rank in range(board.num_ranks) if board.get([f"{what}/{rank}"]) is None)
    return OpenTimeout(
        f"rank {board.rank}: ranks {list(missing)} did not come within {timeout_s} s ({what}){board.explain(missing)}",
        rank=board.rank,
        timeout_s=timeout_s,
        missing=missing,
    )


def host_id() -> str:
    """Return what is equal for processes of one host, containers included, and differs between hosts."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # no Linux
        return socket.gethostname()


@contextmanager
def _answering(rank: int) -> Iterator[None]:
    """Turn errors of a store, such as the loss of the process that has it, into typed ones."""
    try:
        yield
    except RuntimeError as error:
        raise InvalidGroup(f"rank {rank}: the store of the group does not answer ({error})") from error


def _apart(store: Store) -> Store:
    """Return a connection of its own to a store, where it can give one: gloo waits in it, which locks it."""
    try:
        apart: Store = store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # torch before 2.8, or a store that is written in Python
        return store
    return apart


def _counter(kind: str, rank: int) -> str:
    return f"async_eplb/{kind} of rank/{rank}"


def _without_store(group: object, reason: str) -> InvalidGroup:
    return InvalidGroup(
        f"{type(group).__name__} is no process group by whose store ranks could find each other ({reason}); pass a "
        "torch.distributed.ProcessGroup. ProcessGroup(store, rank, size) makes one over the store of any other kind"
    )
