"""Canaries and checksums: what they find, and which facts their errors have."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import float_weights
from torch import Tensor

from async_eplb import ExpertWeights
from async_eplb.device import CpuDevice
from async_eplb.errors import CanaryMismatch, ChecksumMismatch
from async_eplb.scratch import Scratch
from async_eplb.verify.checksum import plain_checksums
from async_eplb.verify.column import Verifier, Verify, checksum_scratch_nbytes, checksums

SLOTS = {0: 5, 1: 7}
"""Slot → logical expert."""


def content_of(verifier: Verifier) -> dict[int, tuple[Tensor, ...]]:
    """Return the bytes of both slots, the column last."""
    return {slot: verifier.weights.slot_views(0, slot) for slot in SLOTS}


def marked(mode: Verify) -> Verifier:
    """Return the verifier of two slots, marked with their experts."""
    verifier = Verifier(mode, ExpertWeights(float_weights()), rank=3)
    verifier.mark(0, np.array(list(SLOTS.values())), (0, 1), scratch_of(verifier))
    return verifier


def scratch_of(verifier: Verifier) -> Scratch:
    """Return as much as the verifier asks for."""
    return Scratch(CpuDevice(), verifier.scratch_nbytes(0))


def checksum(parts: Sequence[Tensor]) -> int:
    """Return the checksum of one slot."""
    return int(checksums([parts], Scratch(CpuDevice(), checksum_scratch_nbytes(1, len(parts))))[0])


@given(st.binary(min_size=1, max_size=40), st.data())
def test_a_checksum_notices_any_changed_byte(content: bytes, data: st.DataObject) -> None:
    """Also one of the last, where the bytes fill no whole word."""
    parts = [torch.tensor(list(content), dtype=torch.uint8)]
    before = checksum(parts)
    parts[0][data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum(parts) != before


def test_a_checksum_notices_the_order() -> None:
    """Of words and of parts."""
    one, other = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    one[0], other[8] = 1, 1
    assert len({checksum(parts) for parts in ([one], [other], [one, other], [other, one])}) == 4


@pytest.mark.parametrize("mode", Verify)
def test_what_is_right_passes(mode: Verify) -> None:
    """Slots that were marked and not touched."""
    verifier = marked(mode)
    verifier.check(0, SLOTS, content_of(verifier), "staged", scratch_of(verifier))


@pytest.mark.parametrize("mode", [Verify.CANARY, Verify.CHECKSUM])
def test_a_wrong_expert_is_named(mode: Verify) -> None:
    """The error names layer, rank and slots, and what all of them should be and are."""
    verifier = marked(mode)
    with pytest.raises(CanaryMismatch, match="layer 0, rank 3: staged slots") as caught:
        verifier.check(0, {0: 5, 1: 6}, content_of(verifier), "staged", scratch_of(verifier))
    error = caught.value
    assert (error.layer, error.rank, error.slots) == (0, 3, (1,))
    assert (error.expected, error.actual) == ([5, 6], [5, 7])


def test_a_wrong_byte_is_named() -> None:
    """What is expected is the sum taken at the source."""
    verifier = marked(Verify.CHECKSUM)
    content = content_of(verifier)
    right = [checksum(parts[:-1]) for parts in content.values()]
    content[0][0][3] = 1
    with pytest.raises(ChecksumMismatch, match="live slots") as caught:
        verifier.check(0, SLOTS, content, "live", scratch_of(verifier))
    assert caught.value.slots == (0,)
    assert list(caught.value.expected) == right
    assert caught.value.actual[1] == right[1] != caught.value.actual[0]


def checksums_as_on_a_gpu(slots: Sequence[Sequence[Tensor]], scratch: Scratch) -> Tensor:
    """Take what one kernel launch needs: a table of parts, and the sums."""
    scratch.upload(np.zeros((sum(map(len, slots)), 4), dtype=np.int64))
    scratch.take(8 * len(slots))
    return plain_checksums(slots)


@pytest.mark.parametrize("mode", Verify)
@pytest.mark.parametrize("num_slots", [1, 2, 33])
def test_scratch_is_enough_for_a_layer(mode: Verify, num_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mark and two checks of all slots fit."""
    monkeypatch.setattr("async_eplb.verify.column.checksums", checksums_as_on_a_gpu)
    verifier = Verifier(mode, ExpertWeights({0: [torch.zeros(num_slots, width) for width in (3, 2)]}), rank=0)
    scratch = scratch_of(verifier)
    slots = range(num_slots)
    verifier.mark(0, np.zeros(num_slots, dtype=np.int64), slots, scratch)
    content = {slot: verifier.weights.slot_views(0, slot) for slot in slots}
    for where in ("staged", "live"):
        verifier.check(0, dict.fromkeys(slots, 0), content, where, scratch)
