"""Loads: what is accepted and refused, and what a window on the device counts."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import together
from support.loads import MemoryLoadGroup, counted, local_group
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from async_eplb.device import CpuDevice
from async_eplb.errors import BrokenLoadGroup, InvalidLoad, InvalidOptions
from async_eplb.load.group import GlooLoadGroup
from async_eplb.load.value import ExpertLoad
from async_eplb.load.window import LoadWindow
from async_eplb.testing import WorldRank, run_world
from async_eplb.workers import ThreadWorkers


@pytest.mark.parametrize(
    "counts", [[[1, 2], [3, 0]], np.array([[1, 2], [3, 0]]), torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)]
)
def test_counts_of_any_kind(counts: object) -> None:
    """Nested sequences, arrays and tensors are alike; integers stay integers."""
    load = ExpertLoad.from_counts(counts)
    assert (load.tokens.tolist(), load.tokens.dtype.name, load.num_steps) == ([[1, 2], [3, 0]], "int64", 1)


def test_half_precision_counts() -> None:
    """Tensors of a type that numpy does not have become float64."""
    assert ExpertLoad.from_counts(torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)).tokens.tolist() == [[0.5, 2.0]]


def test_counts_of_several_steps_are_summed() -> None:
    """The first of three dimensions is the step."""
    load = ExpertLoad.from_counts([[[1, 2]], [[3, 4]], [[0, 1]]])
    assert (load.tokens.tolist(), load.num_steps) == ([[4, 7]], 3)
    assert load.tokens_per_step().tolist() == [[4 / 3, 7 / 3]]


def test_loads_cannot_be_changed() -> None:
    """The table is read-only and no view of the caller's array."""
    array = np.array([[1, 2]])
    load = ExpertLoad.from_counts(array)
    array[0, 0] = 5
    with pytest.raises(ValueError, match="read-only"):
        load.tokens[0, 0] = 5
    assert load == ExpertLoad.from_counts([[1, 2]])


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [[]],
        [1, 2],
        [[1], [2, 3]],
        [[[[1]]]],
        [["a"]],
        [[True]],
        [[None]],
        [[-1, 2]],
        [[0.5, float("nan")]],
        [[float("inf"), 1.0]],
        [[2**53 + 2, 1]],
        [[[1, -1]], [[1, 5]]],
        torch.tensor([[1 + 1j]]),
    ],
)
def test_impossible_loads_are_refused(counts: object) -> None:
    """Wrong shapes, NaN, infinite, negative and uncountably large numbers."""
    with pytest.raises(InvalidLoad):
        ExpertLoad.from_counts(counts)


def test_an_impossible_number_is_located() -> None:
    """The error says where."""
    with pytest.raises(InvalidLoad, match="layer 1: logical expert 0 has -3 tokens"):
        ExpertLoad.from_counts([[0, 1], [-3, 7]])


def test_a_load_covers_a_step() -> None:
    """Nothing is counted in no steps."""
    with pytest.raises(InvalidLoad, match="num_steps"):
        ExpertLoad.from_counts([[1]], num_steps=0)


@pytest.mark.parametrize("suffix", [".json", ".pt", "inline"])
def test_loads_are_read_as_engines_write_them(tmp_path: Path, suffix: str) -> None:
    """Files of both kinds and inline JSON, under the key ``logical_count``."""
    counts = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    source: str | Path = tmp_path / f"load{suffix}"
    if suffix == ".pt":
        torch.save({"logical_count": torch.tensor(counts)}, source)
    elif suffix == ".json":
        Path(source).write_text(json.dumps({"logical_count": counts}))
    else:
        source = json.dumps({"logical_count": counts})
    assert ExpertLoad.load(source).tokens.tolist() == [[6, 8], [10, 12]]


@pytest.mark.parametrize(
    "source", ["{", "[]", "{}", '{"physical_to_logical_map": [[0]]}', "missing.json", "missing.pt", "load.csv"]
)
def test_unreadable_loads_are_refused(source: str) -> None:
    """Whatever is wrong with a file, the error is one of ours."""
    with pytest.raises(InvalidLoad):
        ExpertLoad.load(source)


@given(st.recursive(st.integers() | st.floats() | st.text() | st.none() | st.booleans(), st.lists).map(json.dumps))
def test_arbitrary_inline_documents_never_crash(document: str) -> None:
    """Any text is a load or a clear error."""
    with suppress(InvalidLoad):
        ExpertLoad.load('{"logical_count": ' + document + "}")


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
    """A later map does not change what was counted; empty slots and padding count for nobody."""
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


class OpNames(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of operations that tensors are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        by_mask = name == "aten::index" and any(index.dtype == torch.bool for index in args[1])
        self.names.add("aten::nonzero" if by_mask else name)
        return func(*args, **(kwargs or {}))


class BrokenGroup:
    """A group in which gathering ends where it would wait for the first time."""

    num_ranks = 1

    async def sum(self, counts: Tensor) -> Tensor:
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
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal"}
    assert not {f"aten::{name}" for name in waiting} & ops.names


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


@pytest.mark.anyio
async def test_ranks_of_one_process_get_their_sum() -> None:
    """Also twice in a row; all get the same."""
    group = MemoryLoadGroup(3)
    windows = [LoadWindow(1, 2, 4) for _ in range(3)]
    for round_ in (1, 2):
        for window in windows:
            window.record(0, torch.tensor([0, 1, 1]))
            window.advance()
        loads = await together([partial(window.gather, group) for window in windows])
        assert loads == [ExpertLoad.from_counts([[3 * round_, 6 * round_]], num_steps=round_)] * 3


def gather_between_processes(world: WorldRank) -> list[list[int]]:
    """Record different tokens on each rank and return the load of all."""

    async def gather() -> ExpertLoad:
        workers = ThreadWorkers()
        group = await GlooLoadGroup.open(CpuDevice(), workers, timeout_s=30)
        window = LoadWindow(2, 3, 4)
        window.record(1, torch.full((world.rank + 1,), world.rank))
        window.advance()
        await window.gather(group)
        return await window.gather(group, "decode")

    load = anyio.run(gather)
    assert (load.num_steps, load.phase) == (1, "decode")
    return [[int(tokens) for tokens in row] for row in load.tokens]


def test_processes_get_their_sum() -> None:
    """Over real sockets."""
    assert run_world(gather_between_processes, 3) == [[[0, 0, 0], [1, 2, 3]]] * 3


def gather_without_rank_one(world: WorldRank) -> str:
    """Leave rank 0 alone in a sum."""

    async def gather() -> str:
        group = await GlooLoadGroup.open(CpuDevice(), ThreadWorkers(), timeout_s=2)
        if world.rank == 1:
            return "did not take part"
        try:
            await LoadWindow(1, 1, 1).gather(group)
        except BrokenLoadGroup as error:
            return f"rank {error.rank} noticed"
        return "nobody noticed"

    return anyio.run(gather)


def test_a_rank_that_does_not_take_part_is_noticed() -> None:
    """The others get an error instead of waiting forever."""
    assert run_world(gather_without_rank_one, 2) == ["rank 0 noticed", "did not take part"]


def leave_rank_zero_alone_and_close(world: WorldRank) -> bool:
    """Rank 0 begins a sum that rank 1 does not; both are told to end. Return whether it ended as a cancelled one."""

    async def end() -> bool:
        group = await GlooLoadGroup.open(CpuDevice(), ThreadWorkers(), timeout_s=60)
        async with anyio.create_task_group() as tasks:
            if world.rank == 0:
                tasks.start_soon(LoadWindow(1, 1, 1).gather, group)
                await anyio.sleep(0.1)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(dist.barrier)
            group.close()
        return tasks.cancel_scope.cancelled_caught

    return anyio.run(end)


def test_a_cancelled_sum_ends_when_the_group_is_closed() -> None:
    """Long before its timeout, and without an error."""
    begun_s = time.monotonic()
    assert run_world(leave_rank_zero_alone_and_close, 2) == [True, False]
    assert time.monotonic() - begun_s < 30
