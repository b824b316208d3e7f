"""Scratch memory: pieces, uploads, and when the host's part may be written again."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.updates import examples
from torch import Tensor

from async_eplb.device import CpuDevice, DeviceEvent
from async_eplb.errors import EplbError
from async_eplb.scratch import ALIGNMENT, Scratch, aligned


class BehindDevice(CpuDevice):
    """Remembers in which order uploads were recorded and waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self) -> DeviceEvent:
        self.calls.append("record")
        return _Event(self.calls)


class _Event:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._calls.append("synchronize")


@examples
@given(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), max_size=4))
def test_pieces_are_apart_and_hold_what_was_uploaded(groups: list[list[int]]) -> None:
    """Also after others were uploaded and taken; as many bytes as the aligned pieces take are enough."""
    scratch = Scratch(CpuDevice(), 2 * sum(aligned(8 * size) for group in groups for size in group))
    for seed in range(2):
        scratch.clear()
        rng = np.random.default_rng(seed)
        uploaded: list[tuple[Tensor, npt.NDArray[np.int64]]] = []
        for group in groups:
            arrays = [rng.integers(-(2**63), 2**63 - 1, size) for size in group]
            uploaded += zip(scratch.upload(*arrays), arrays, strict=True)
            for size in group:
                scratch.take(8 * size).fill_(0xFF)
        for piece, array in uploaded:
            assert piece.tolist() == array.tolist()
            assert (piece.data_ptr() - uploaded[0][0].data_ptr()) % ALIGNMENT == 0


def test_shapes_and_dtypes_are_kept() -> None:
    """Of tables with no rows too; and where there is nothing to upload, nothing is."""
    scratch = Scratch(CpuDevice(), 768)
    full, empty, short = scratch.upload(
        np.arange(6).reshape(2, 3), np.zeros((0, 3), dtype=np.int64), np.array([-1, 5], dtype=np.int32)
    )
    assert full.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert empty.shape == (0, 3)
    assert (short.tolist(), short.dtype) == ([-1, 5], torch.int32)
    assert scratch.upload() == []


def test_the_host_part_is_written_again_only_when_it_was_read() -> None:
    """Rule 14: the device may be behind with an upload when the next layer comes."""
    device = BehindDevice()
    scratch = Scratch(device, 256)
    scratch.upload(np.arange(3))
    device.calls.clear()
    scratch.clear()
    scratch.upload(np.arange(3))
    assert device.calls == ["synchronize", "record"]


@pytest.mark.parametrize("nbytes", [0, 255, 256, 512])
def test_it_does_not_grow(nbytes: int) -> None:
    """More than there is is refused, and nothing is allocated."""
    scratch = Scratch(CpuDevice(), nbytes)
    with pytest.raises(EplbError, match="no room"):
        scratch.upload(np.arange(nbytes // 8 + 1))
    with pytest.raises(EplbError, match="no room"):
        scratch.take(nbytes + 1)
