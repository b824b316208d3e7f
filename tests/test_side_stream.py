"""A side stream, on a device that only records which stream waits for which."""

from contextlib import nullcontext

import pytest
import torch

from async_eplb.device import SideStream


class Stream:
    """A stream that records which streams it waits for."""

    cuda_stream = 7

    def __init__(self) -> None:
        self.waits_for: list[Stream] = []

    def wait_stream(self, stream: "Stream") -> None:
        self.waits_for.append(stream)


def test_it_waits_for_the_current_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is made current; nothing waits for it."""
    current, beside = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    side = SideStream(torch.device("cuda", 0))
    for times in (1, 2):
        with side.aside() as handle:
            assert handle == Stream.cuda_stream
        assert beside.waits_for == [current] * times
    assert current.waits_for == []
