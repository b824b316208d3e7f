"""The table of a fused commit: every byte once, and the same outcome as plain copies."""

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layouts import ROW, Layer, random_layer
from torch import Tensor

from async_eplb import ExpertWeights
from async_eplb.commit.table import (
    BYTEWISE_CHUNK_NBYTES,
    CHUNK_NBYTES,
    MOST_CHUNKS,
    VECTOR_NBYTES,
    CommitTables,
    chunk_table,
    increment,
    most_chunks,
)
from async_eplb.errors import EplbError
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.plan import LayerPlan
from async_eplb.staging import BufferState, StagingBuffer

_LIVE = 1 << 40
_SIZES = st.one_of(st.integers(0, 100_000), st.sampled_from([0, 1, 15, 16, 17, CHUNK_NBYTES, CHUNK_NBYTES + 1]))


@st.composite
def disjoint_segments(draw: st.DrawFn) -> npt.NDArray[np.int64]:
    """Draw segments that do not overlap, of any size and alignment."""
    segments = []
    src, dst = 0, _LIVE
    for _ in range(draw(st.integers(0, 6))):
        nbytes = draw(_SIZES)
        shift = st.sampled_from([0, 0, 1, 2, 4, 8, 16])
        src, dst = (-(-address // 256) * 256 + draw(shift) for address in (src, dst))
        segments.append((src, dst, nbytes))
        src, dst = src + nbytes, dst + nbytes
    return np.array(segments, dtype=np.int64).reshape(-1, 3)


def in_bytes(table: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (source, destination, bytes) of each chunk."""
    return [(src, dst, VECTOR_NBYTES * amount if amount > 0 else -amount) for src, dst, amount in table.tolist()]


@given(disjoint_segments())
def test_every_byte_is_in_one_chunk(segments: npt.NDArray[np.int64]) -> None:
    """Each destination byte is written once, from its own source byte, and no others are."""
    size = int(max((dst + nbytes for _, dst, nbytes in segments), default=_LIVE)) - _LIVE
    written = np.zeros(size, dtype=np.int64)
    origin = np.full(size, -1)
    for src, dst, nbytes in in_bytes(chunk_table(segments)):
        written[dst - _LIVE :][:nbytes] += 1
        origin[dst - _LIVE :][:nbytes] = np.arange(src, src + nbytes)
    expected = np.full(size, -1)
    for src, dst, nbytes in segments:
        expected[dst - _LIVE :][:nbytes] = np.arange(src, src + nbytes)
    assert origin.tolist() == expected.tolist()
    assert written.tolist() == (expected >= 0).tolist()


@given(disjoint_segments())
def test_vectors_are_aligned_and_chunks_bounded(segments: npt.NDArray[np.int64]) -> None:
    """The kernel assumes both."""
    table = chunk_table(segments)
    assert len(table) <= sum(map(most_chunks, segments[:, 2].tolist()))
    for src, dst, amount in table.tolist():
        assert amount != 0
        if amount > 0:
            assert src % VECTOR_NBYTES == dst % VECTOR_NBYTES == 0
            assert amount * VECTOR_NBYTES <= CHUNK_NBYTES
        else:
            assert -amount <= BYTEWISE_CHUNK_NBYTES


@given(st.lists(st.tuples(st.sampled_from([100, 7168, 29 << 20]), st.booleans()), min_size=1, max_size=400))
def test_a_table_is_never_large(drawn: list[tuple[int, bool]]) -> None:
    """However many bytes there are; and what segments take at most holds for some of them too."""
    segments = np.array([(0, 0, nbytes) for nbytes, _ in drawn])
    some = segments[[chosen for _, chosen in drawn]]
    table = chunk_table(some)
    assert len(table) <= MOST_CHUNKS + 2 * len(some)
    assert len(table) <= sum(map(most_chunks, segments[:, 2].tolist()))
    assert sum(nbytes for _, _, nbytes in in_bytes(table)) == some[:, 2].sum()


def test_aligned_segments_are_copied_in_vectors() -> None:
    """Only what is left of the last vector goes byte by byte, and first."""
    segments = np.array([(0, 1 << 20, CHUNK_NBYTES + 40)], dtype=np.int64)
    body = CHUNK_NBYTES // VECTOR_NBYTES
    assert chunk_table(segments).tolist() == [
        [CHUNK_NBYTES + 32, (1 << 20) + CHUNK_NBYTES + 32, -8],
        [0, 1 << 20, body],
        [CHUNK_NBYTES, (1 << 20) + CHUNK_NBYTES, 2],
    ]


def test_an_increment_has_no_amount() -> None:
    """By this the kernel distinguishes it from a copy."""
    assert increment(64).tolist() == [[0, 64, 0]]


class ByHand:
    """Does what the kernel does with a table, entry by entry, on the CPU."""

    def __init__(self, weights: ExpertWeights, expert_map: ExpertMap) -> None:
        self._tables = CommitTables(weights, expert_map)

    def scratch_nbytes(self, row: int) -> int:
        return self._tables.nbytes(row)

    def prepare(self, row: int, plan: LayerPlan, buffer: StagingBuffer, maps: LayerMaps) -> "Execution":
        own, table = self._tables.write(row, plan, buffer, maps)
        Execution(own).run()
        return Execution(table)


class Execution:
    """A table, and what the kernel does with it."""

    def __init__(self, table: Tensor) -> None:
        self.table = table.numpy()

    def run(self) -> int:
        for (src, dst, nbytes), amount in zip(in_bytes(self.table), self.table[:, 2].tolist(), strict=True):
            if amount == 0:
                ctypes.c_int64.from_address(dst).value += 1
            ctypes.memmove(dst, src, nbytes)
        return 0


@given(st.integers(0, 2**31), st.booleans())
def test_the_table_does_what_plain_copies_do(seed: int, aligned: bool) -> None:  # noqa: FBT001 - drawn
    """Weights, the gaps between slots, all maps and generations end as a loop of copies leaves them."""
    plain = random_layer(seed, aligned=aligned, max_elements=3000)
    by_table = random_layer(seed, committer=ByHand, aligned=aligned, max_elements=3000)
    plain.commit.run()
    by_table.commit.run()
    assert all(same(one, other) for one, other in zip(plain.state(), by_table.state(), strict=True))


def same(one: Tensor, other: Tensor) -> bool:
    return one.tolist() == other.tolist()


@given(st.integers(0, 2**31))
def test_a_plain_commit_replaces_the_slots_of_its_plan(seed: int) -> None:
    """Slots hold what was staged for them, others what they held; the layer's map is the new one."""
    before, layer = (random_layer(seed, max_elements=100) for _ in range(2))
    for own in layer.plan.local_copies:
        assert all(map(same, layer.buffer.views(own.dst_slot), before.weights.slot_views(ROW, own.src_slot)))
    nbytes = layer.commit.run()
    sources = {slot: slot for slot in layer.plan.staged_slots}
    sources |= {fan_out.dst_slot: fan_out.staged_slot for fan_out in layer.plan.fan_outs}
    for slot in range(layer.weights.num_local_physical_experts):
        expected = layer.buffer.views(sources[slot]) if slot in sources else before.weights.slot_views(ROW, slot)
        assert all(map(same, layer.weights.slot_views(ROW, slot), expected))
    assert nbytes == len(sources) * sum(layer.weights.slot_nbytes(ROW))
    assert all(map(same, layer.expert_map.published(ROW), layer.expert_map.staged(layer.maps)))
    assert layer.expert_map.layer_generation.tolist() == [0, 1]


def test_a_layer_that_is_not_staged_is_not_committed() -> None:
    """Its buffer refuses, and nothing is written."""
    layer = random_layer(0)
    before = layer.state()
    layer.buffer.enter(BufferState.FREE)
    with pytest.raises(EplbError, match="cannot go from free to committing"):
        layer.commit.run()
    assert all(map(same, layer.state(), before))


def test_what_a_table_needs_is_known_before_the_plan() -> None:
    """Scratch is sized once: every plan's table and maps fit, else preparing the commit would raise."""
    for seed in range(200):
        layer: Layer = random_layer(seed, committer=ByHand, max_elements=3000)
        assert isinstance(layer.commit, Execution)
        assert layer.commit.table.nbytes < layer.buffer.scratch.nbytes


def test_what_a_table_needs_does_not_depend_on_addresses() -> None:
    """So it is equal on all ranks, and the same after weights have moved."""
    aligned, crooked = (
        ExpertWeights({0: [torch.zeros(5, width, dtype=torch.uint8)[:, shift : 1000 + shift]]})
        for width, shift in ((1024, 0), (1031, 3))
    )
    published = random_layer(0).expert_map
    assert CommitTables(aligned, published).nbytes(0) == CommitTables(crooked, published).nbytes(0)


def test_a_table_takes_little_of_staging() -> None:
    """Of DeepSeek-V3 in FP8, whose slots have 44 MB, less than a hundredth for each slot."""
    slot_nbytes = (4096 * 7168, 7168 * 2048, 32 * 56 * 4, 56 * 16 * 4)
    assert sum(map(most_chunks, slot_nbytes)) * 24 < sum(slot_nbytes) / 100
