"""Streams beside the current one, as a device sees them that does nothing."""

import pytest
import torch

from async_eplb.device import SideStreams

DEVICE = torch.device("cuda", 0)


class Event:
    """An event that remembers its stream."""

    def __init__(self, **_: object) -> None:
        self.of: Stream | None = None

    def record(self, stream: "Stream") -> None:
        self.of = stream


class Stream:
    """A stream that remembers what it waits for."""

    made: "list[Stream]"

    def __init__(self, _device: torch.device) -> None:
        self.made.append(self)
        self.waits_for: list[Stream | None] = []
        self.cuda_stream = len(self.made)

    def wait_event(self, event: Event) -> None:
        self.waits_for.append(event.of)

    def wait_stream(self, stream: "Stream") -> None:
        self.waits_for.append(stream)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Replace streams and events; return the current stream."""
    monkeypatch.setattr(Stream, "made", [], raising=False)
    stream = Stream(DEVICE)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    return stream


def lanes_of(handles: object) -> list[Stream]:
    assert isinstance(handles, list)
    return [Stream.made[handle - 1] for handle in handles]


def test_lanes_wait_for_the_current_stream_alone(current: Stream) -> None:
    """Not for each other, also the second time: a lane that is done goes on while others are not."""
    streams = SideStreams(DEVICE)
    lanes = lanes_of(streams.forked(3))
    streams.joined()
    assert lanes_of(streams.forked(3)) == lanes
    assert [lane.waits_for for lane in lanes] == [[current, current]] * 3


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_end_is_behind_all_lanes_and_the_current_stream(current: Stream, number: int) -> None:
    """Also if nothing is enqueued on any, and if there were more the time before."""
    streams = SideStreams(DEVICE)
    lanes = lanes_of(streams.forked(3)) + lanes_of(streams.forked(number))
    end = streams.joined()
    assert isinstance(end, Event)
    assert end.of is not None
    assert set(end.of.waits_for) == set(lanes)
    assert end.of is not current
    assert current.waits_for == []


def test_there_is_an_end_before_there_are_lanes(current: Stream) -> None:
    """For copies that fail before they begin."""
    end = SideStreams(DEVICE).joined()
    assert isinstance(end, Event)
    assert end.of is not None
    assert end.of.waits_for == []
    assert current.waits_for == []
