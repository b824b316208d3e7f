"""The order in which ranks of a host read each other's weights while none serves: each source has one reader at a time.

A GPU has one engine for copies between GPUs, so a rank reads from one peer at a time, however many streams it has. Left
to themselves, ranks meet at a source, where each gets its share, while the links of other sources idle: like any closed
network of ``n`` customers and ``n`` servers that share their time (Gordon and Newell, 1967), they use ``n / (2n - 1)``
of it, four ranks 0.57. So for each layer a source's readers take turns, in the order of the ring, and pass the turn on
by writing to host memory that the ranks share. Devices wait and write, in the stream of the copies.

A rank that waits for its turn waits for its peers. That is why ranks take turns only while none serves, and why they
all take part in each layer, whether they read anything or not.
"""

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import NamedTuple

import numpy as np

_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - mkstemp makes the file, for this user alone
_NUM_LATEST = 64
"""Turns at one source that have cells of their own; ranks are never so many layers apart."""
_FAR = 1 << 30
"""Further ahead than any turn that is waited for. Comparisons are cyclic, as the driver makes them."""


class Cell(NamedTuple):
    """A number in host memory that a device waits for or writes.

    :param address: on the device
    :param number: unsigned, of 32 bits
    """

    address: int
    number: int


def sources_of(rank: int, members: Sequence[int]) -> list[int]:
    """Return the ranks that a rank reads from, in its order: the next member first, then around the ring."""
    place = members.index(rank)
    return [*members[place + 1 :], *members[:place]]


def next_reader(rank: int, source: int, members: Sequence[int]) -> tuple[int, int]:
    """Return the rank that reads from ``source`` after ``rank``, and how many layers later: 1 after the last, else 0.

    The first reader of a source is the member before it, and the last one the member behind it.
    """
    before = members[members.index(rank) - 1]
    return (before, 0) if before != source else (members[members.index(source) - 1], 1)


class Turns:
    """One rank's turns, layer after layer.

    Cells are written by one peer and waited for by their rank. Each of the latest turns has its own: so a peer that
    writes late cannot undo a :meth:`release`.

    :param num_ranks: of the EP group; all that share memory have the same
    :raises OSError: if there is no shared memory
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank = rank
        self._shape = (_NUM_LATEST, num_ranks)
        self._nbytes = 4 * _NUM_LATEST * num_ranks
        file, self.path = mkstemp(prefix="async_eplb-", dir=_SHARED_MEMORY)
        """Path of this rank's cells, for the others to map."""
        try:
            os.posix_fallocate(file, 0, self._nbytes)  # else the first write is a signal if it is full
            self._cells = self._map(file)
        except OSError:
            self.unlink()
            raise
        self._peers: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.uint32]]] = {}
        self._addresses: dict[int, int] = {}
        self._members: tuple[int, ...] = (rank,)
        self._number = 0

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks that take turns, ascending."""
        return self._members

    def map(self, paths: Mapping[int, str], to_device: Callable[[int, int], int]) -> None:
        """Map the cells of all peers.

        :param paths: by peer
        :param to_device: from address and bytes of host memory to where the device sees it
        :raises RuntimeError: if there is no such memory
        """
        self._members = tuple(sorted({self._rank, *paths}))
        for peer, path in paths.items():
            try:
                self._peers[peer] = self._map(os.open(path, os.O_RDWR))
            except (OSError, ValueError) as error:
                raise RuntimeError(
                    f"the turns of rank {peer} cannot be mapped: ranks of a host must share {_SHARED_MEMORY} ({error})"
                ) from error
        for rank, cells in ((self._rank, self._cells), *self._peers.items()):
            self._addresses[rank] = to_device(cells.ctypes.data, cells.nbytes)
        for source in sources_of(self._rank, self._members):
            if self._members[self._members.index(source) - 1] == self._rank:
                self._cells[0, source] = 1

    def unlink(self) -> None:
        """Remove the file's name, when all peers have mapped the cells or none will."""
        with suppress(FileNotFoundError):
            Path(self.path).unlink()

    def trial(self) -> tuple[Cell, Cell]:
        """Return a cell that needs no wait and a cell that nobody waits for: no rank reads from itself."""
        return Cell(self._addresses[self._rank] + 4 * self._rank, 0), self._cell(self._rank, self._rank, 0)

    def around(self, source: int) -> tuple[Cell, Cell]:
        """Return the cells that a read from ``source`` waits for, and writes for the next reader."""
        reader, later = next_reader(self._rank, source, self._members)
        return self._cell(self._rank, source, self._number), self._cell(reader, source, self._number + later)

    def advance(self) -> None:
        """Go on to the next layer."""
        self._number += 1

    def release(self) -> None:
        """End all waits of this rank for turns, now and later."""
        self._cells[:] = (self._number + _FAR) % (1 << 32)

    def unmap(self, from_device: Callable[[int], None]) -> None:
        """Unmap all cells from the device.

        :param from_device: undoes the mapping of a host address
        """
        for rank in [*self._addresses]:
            del self._addresses[rank]
            from_device((self._cells if rank == self._rank else self._peers[rank]).ctypes.data)

    def _cell(self, rank: int, source: int, number: int) -> Cell:
        index = number % _NUM_LATEST * self._shape[1] + source
        return Cell(self._addresses[rank] + 4 * index, (number + 1) % (1 << 32))

    def _map(self, file: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
        try:
            memory = mmap.mmap(file, self._nbytes)
        finally:
            os.close(file)
        return np.frombuffer(memory, dtype=np.uint32).reshape(self._shape)
