"""Windows: which tokens are counted on the device, and how."""

import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loads import OpNames, counted, local_group
from torch import Tensor

from async_eplb.device import DeviceEvent
from async_eplb.errors import BrokenLoadGroup, InvalidLoad, InvalidOptions
from async_eplb.load.value import ExpertLoad
from async_eplb.load.window import LoadWindow


@st.composite
def recordings(draw: st.DrawFn) -> list[list[tuple[int, str, list[int]]]]:
    """Draw what is recorded in each step: layer, phase, experts (negative ones are padding)."""
    record = st.tuples(
        st.integers(0, 1), st.sampled_from(["prefill", "decode"]), st.lists(st.integers(-2, 3), max_size=6)
    )
    return draw(st.lists(st.lists(record, max_size=3), max_size=6))


@given(recordings(), st.integers(1, 4))
def test_a_window_counts_its_last_steps(steps: list[list[tuple[int, str, list[int]]]], window_steps: int) -> None:
    """Each expert's tokens of each phase, over the last steps only, without padding."""
    window = LoadWindow(2, 4, window_steps)
    expected = {phase: np.zeros((len(steps), 2, 4), dtype=int) for phase in ("prefill", "decode")}
    for step, records in enumerate(steps):
        for layer, phase, experts in records:
            window.record(layer, torch.tensor(experts, dtype=torch.int32), phase=phase)
            for expert in experts:
                expected[phase][step, layer, expert] += expert >= 0
        window.advance()
    for phase, counts in expected.items():
        assert counted(window, phase) == counts[-window_steps:].sum(axis=0).tolist()
    assert counted(window) == sum(c[-window_steps:].sum(axis=0) for c in expected.values()).tolist()
    assert window.num_steps() == min(window_steps, len(steps))


def test_an_unfinished_step_is_not_in_the_window() -> None:
    """Its tokens enter when it ends."""
    window = LoadWindow(1, 2, 3)
    window.record(0, torch.tensor([0]))
    assert counted(window) == [[0, 0]]
    window.advance()
    assert counted(window) == [[1, 0]]


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_tokens_that_are_not_valid_are_ignored(shape: Sequence[int]) -> None:
    """One flag a token, whatever is recorded of it."""
    window = LoadWindow(1, 2, 1)
    window.record(0, torch.ones(*shape, dtype=torch.int64), valid=torch.tensor([True, False]))
    window.advance()
    assert counted(window) == [[0, int(np.prod(shape)) // 2]]


def test_physical_experts_fold_by_the_map_of_their_step() -> None:
    """A later map does not change what was counted; empty slots and padding are not counted."""
    expert_map = SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 1, 1, -1]]))
    window = LoadWindow(1, 2, 2, expert_map=expert_map)
    window.record(0, torch.tensor([0, 1, 2, 3, -1]), physical=True)
    window.advance()
    expert_map.physical_to_logical_map[0] = torch.tensor([1, 0, 0, 0])
    window.record(0, torch.tensor([0, 1, 2, 3, -1]), physical=True)
    window.advance()
    assert counted(window) == [[1 + 3, 2 + 1]]


def addresses_of(window: LoadWindow) -> list[int]:
    """Return where each of a window's tensors is."""
    return [value.data_ptr() for value in vars(window).values() if isinstance(value, Tensor)]


def test_recording_keeps_its_buffers() -> None:
    """Addresses stay the same, so that a CUDA graph may hold them."""
    window = LoadWindow(1, 2, 2)
    addresses = addresses_of(window)
    for _ in range(5):
        window.record(0, torch.tensor([0]))
        window.advance()
    assert len(addresses) > 1
    assert addresses_of(window) == addresses


class BrokenGroup:
    """A group in which gathering ends where it would wait for the first time."""

    num_ranks = 1

    async def sum(self, counts: Tensor, _after: DeviceEvent | None = None) -> Tensor:
        """Add nothing up."""
        raise BrokenLoadGroup(f"{counts.shape} is not summed", rank=0, timeout_s=0)


def test_recording_never_waits_for_the_device() -> None:
    """It reads no value on the host, and selects by no mask, whose count the host would have to know."""
    expert_map = SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 1, 1, -1]]))
    window = LoadWindow(1, 2, 2, expert_map=expert_map)
    with OpNames() as ops:
        window.record(0, torch.tensor([[0, 3], [1, -1]]), physical=True, valid=torch.tensor([True, False]))
        window.advance()
        with pytest.raises(BrokenLoadGroup):
            anyio.run(window.gather, BrokenGroup())
    assert "aten::scatter_add_" in ops.names
    assert not ops.waiting


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 0}, {"num_logical_experts": 0}, {"window_steps": 0}, {"phases": ()}, {"phases": ("a", "a")}],
)
def test_impossible_windows_are_refused(options: dict[str, object]) -> None:
    """The error names the option."""
    given_options: dict[str, object] = {"num_layers": 1, "num_logical_experts": 1, "window_steps": 1} | options
    with pytest.raises(InvalidOptions) as caught:
        LoadWindow(**given_options)  # type: ignore[arg-type]
    assert caught.value.option in options


def test_what_cannot_be_recorded_is_refused() -> None:
    """A phase that is not counted, and physical experts without a map."""
    window = LoadWindow(1, 1, 1, phases=("decode",))
    with pytest.raises(InvalidOptions, match="this window counts decode"):
        window.record(0, torch.tensor([0]), phase="prefill")
    with pytest.raises(InvalidOptions, match="expert_map"):
        window.record(0, torch.tensor([0]), physical=True)


@pytest.mark.anyio
async def test_a_load_of_a_phase_covers_its_own_steps() -> None:
    """Steps of other phases count for the whole load only."""
    window = LoadWindow(1, 2, 8)
    for phase, experts in (("prefill", [0, 0, 1]), ("decode", [1]), ("decode", [0])):
        window.record(0, torch.tensor(experts), phase=phase)
        window.advance([phase])
    group = local_group()
    assert await window.gather(group, "decode") == ExpertLoad.from_counts([[1, 1]], num_steps=2, phase="decode")
    assert await window.gather(group) == ExpertLoad.from_counts([[3, 2]], num_steps=3)


def test_steps_are_counted_while_another_thread_serves() -> None:
    """The model runs in a thread of its own; the load is taken in the event loop's."""
    window = LoadWindow(1, 1, 1000)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            window.advance()

    interval_s = sys.getswitchinterval()
    thread = threading.Thread(target=serve)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        counts = [window.num_steps("decode") for _ in range(1000)]
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval_s)
    assert counts == sorted(counts)


@pytest.mark.anyio
async def test_an_empty_window_is_a_load_without_tokens() -> None:
    """Nothing has been counted yet."""
    assert await LoadWindow(1, 2, 8).gather(local_group()) == ExpertLoad.from_counts([[0, 0]])


@pytest.mark.anyio
@pytest.mark.parametrize("physical", [False, True])
async def test_experts_beyond_the_model_are_reported(physical: bool) -> None:  # noqa: FBT001
    """Not in the forward pass, where it would have to wait, but when the load is taken."""
    expert_map = SimpleNamespace(physical_to_logical_map=torch.tensor([[0, 1]]))
    window = LoadWindow(1, 2, 8, expert_map=expert_map)
    window.record(0, torch.tensor([0, 2, 7]), physical=physical)
    window.advance()
    with pytest.raises(InvalidLoad, match="2 recorded experts are beyond the 2"):
        await window.gather(local_group())
