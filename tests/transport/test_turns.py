"""Turns at sources: the order of readers, and cells in memory that ranks share."""

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_eplb.transport.copy_engine.turns import Cell, Turns, next_reader, sources_of

MEMBERS: list[tuple[int, ...]] = [(0, 1), (0, 1, 2, 3), (1, 4, 5), (0, 2, 3, 5, 7)]


@pytest.mark.parametrize("members", MEMBERS)
def test_ranks_that_read_at_once_read_from_different_sources(members: tuple[int, ...]) -> None:
    """And each reads from all others."""
    in_order = [sources_of(rank, members) for rank in members]
    for at_once in zip(*in_order, strict=True):
        assert sorted(at_once) == [*members]
    for rank, sources in zip(members, in_order, strict=True):
        assert sorted([rank, *sources]) == [*members]


@pytest.mark.parametrize("members", MEMBERS)
def test_readers_of_a_source_follow_the_ring(members: tuple[int, ...]) -> None:
    """Each hands over to the one that has it next in its own order, the last one to the first of the next layer."""
    for source in members:
        by_place = sorted((sources_of(rank, members).index(source), rank) for rank in members if rank != source)
        readers = [rank for _, rank in by_place]
        expected = [(reader, 0) for reader in readers[1:]] + [(readers[0], 1)]
        assert [next_reader(rank, source, members) for rank in readers] == expected


class Ranks:
    """Turns of several ranks of one process, with a device that has other addresses for host memory."""

    SHIFT = 1 << 40

    def __init__(self, members: tuple[int, ...]) -> None:
        self.turns = {rank: Turns(rank, max(members) + 1) for rank in members}
        self.mapped: list[int] = []
        for rank, turns in self.turns.items():
            turns.map({peer: each.path for peer, each in self.turns.items() if peer != rank}, self._to_device)
        for turns in self.turns.values():
            turns.unlink()

    def _to_device(self, address: int, nbytes: int) -> int:
        assert nbytes > 0
        self.mapped.append(address)
        return address + self.SHIFT

    def has_come(self, cell: Cell) -> bool:
        return (self._at(cell).value - cell.number) % (1 << 32) < 1 << 31

    def write(self, cell: Cell) -> None:
        self._at(cell).value = cell.number

    def _at(self, cell: Cell) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_address(cell.address - self.SHIFT)


@pytest.mark.parametrize("members", MEMBERS)
@given(data=st.data())
def test_a_source_has_one_reader_at_a_time_and_nobody_waits_for_ever(
    members: tuple[int, ...], data: st.DataObject
) -> None:
    """Whichever rank's device goes on next, and for more layers than there are cells."""
    ranks = Ranks(members)
    num_layers = data.draw(st.sampled_from([1, 5, 70]))
    steps: dict[int, list[tuple[int, int, Cell, Cell]]] = {rank: [] for rank in members}
    for layer in range(num_layers):
        for rank, turns in ranks.turns.items():
            steps[rank] += [(layer, source, *turns.around(source)) for source in sources_of(rank, members)]
            turns.advance()
    order: dict[int, list[tuple[int, int]]] = {source: [] for source in members}
    chance = data.draw(st.randoms(use_true_random=False))
    while any(steps.values()):
        ready = [rank for rank, left in steps.items() if left and ranks.has_come(left[0][2])]
        assert len({steps[rank][0][1] for rank in ready}) == len(ready) > 0
        rank = chance.choice(ready)
        layer, source, _, then = steps[rank].pop(0)
        order[source].append((layer, sources_of(rank, members).index(source)))
        ranks.write(then)
    for reads in order.values():
        assert reads == [(layer, place) for layer in range(num_layers) for place in range(len(members) - 1)]


def test_what_a_peer_writes_late_takes_no_release_back() -> None:
    """A rank that gives up waits for nothing that it has enqueued, or will."""
    ranks = Ranks((0, 1, 2))
    first, second = ranks.turns[0], ranks.turns[1]
    waits, passes = [], []
    for _ in range(3):
        waits += [first.around(source)[0] for source in (1, 2)]
        passes.append(second.around(2)[1])
        for turns in (first, second):
            turns.advance()
    assert [ranks.has_come(wait) for wait in waits] == [True] + [False] * 5
    first.release()
    for cell in passes:
        ranks.write(cell)
        assert all(ranks.has_come(wait) for wait in waits)
    assert ranks.has_come(first.around(2)[0])


def test_memory_that_is_not_shared_is_named() -> None:
    """As it is between containers."""
    turns = Turns(0, 2)
    turns.unlink()
    with pytest.raises(
        RuntimeError, match=r"the turns of rank 1 cannot be mapped: ranks of a host must share /dev/shm"
    ):
        turns.map({1: turns.path}, lambda address, _: address)


def test_no_file_is_left_if_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and not a signal at the first write."""
    paths: list[Path] = []

    def full(file: int, _offset: int, _nbytes: int) -> None:
        paths.append(Path(f"/proc/self/fd/{file}").resolve())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Turns(0, 2)
    assert [path.name[:11] for path in paths] == ["async_eplb-"]
    assert not paths[0].exists()


def test_nothing_is_left_behind() -> None:
    """No name in shared memory, and all that a device has mapped is taken back, once."""
    ranks = Ranks((0, 1))
    assert not any(Path(turns.path).exists() for turns in ranks.turns.values())
    unmapped: list[int] = []
    for turns in ranks.turns.values():
        for _ in range(2):
            turns.unmap(unmapped.append)
            turns.unlink()
    assert sorted(unmapped) == sorted(ranks.mapped)
    assert len({*unmapped}) == 4
