"""One layer of random memory layout, on any device: what the tests of the commit share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement, ExpertWeights
from async_eplb.commit.committer import Committer, CopyCommitter, PreparedCommit
from async_eplb.device import device_for
from async_eplb.expert_map import ExpertMap, LayerMaps
from async_eplb.map_tables import MapTables
from async_eplb.plan import FanOut, LayerPlan, LocalCopy, Recv, SlotSource
from async_eplb.staging import BufferSize, BufferState, StagingBuffer, StagingPool
from async_eplb.testing.sample_model import random_placement
from async_eplb.weights import Slots

ROW = 1
"""The layer that is committed, of two."""

_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float32)
_TOPOLOGY = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=5)
_NUM_EXPERTS = 6


@dataclass(frozen=True)
class Layer:
    """A staged layer: live weights in many layouts, a published map, and what shall replace them."""

    storages: list[Tensor]
    """All memory that the live tensors are views of, with the gaps."""
    weights: ExpertWeights
    tables: list[Tensor]
    """All memory that the published tables are views of, with what lies between their rows."""
    expert_map: ExpertMap
    plan: LayerPlan
    maps: LayerMaps
    buffer: StagingBuffer
    commit: PreparedCommit

    def state(self) -> list[Tensor]:
        """Return what a commit may change, on the CPU."""
        return [tensor.cpu() for tensor in (*self.storages, *self.tables, self.expert_map.layer_generation)]


def random_layer(
    seed: int,
    device: torch.device | str = "cpu",
    committer: Callable[[ExpertWeights, ExpertMap], Committer] = CopyCommitter,
    *,
    aligned: bool = False,
    max_elements: int = 40_000,
) -> Layer:
    """Draw a layer; equal seeds give equal layers on all devices.

    :param aligned: slots are as engines have them: tensors in one block each, sizes in multiples of 16 bytes
    :param max_elements: of a slot of a tensor
    """
    rng = np.random.default_rng(seed)
    num_slots = _TOPOLOGY.num_local_physical_experts
    storages, tensors = [], []
    for _ in range(int(rng.integers(1, 6))):
        storage, tensor = _random_tensor(rng, num_slots, device, max_elements, aligned=aligned)
        storages.append(storage)
        tensors.append(tensor)
    weights = ExpertWeights({0: [torch.zeros(num_slots, 3, device=device)], ROW: tensors})
    old, new = (random_placement(rng, 2, _TOPOLOGY.num_physical_experts, _NUM_EXPERTS) for _ in range(2))
    memory, tables = random_tables(rng, old, device)
    expert_map = ExpertMap(old, _TOPOLOGY, rank=1, device=device, tables=tables)
    made = committer(weights, expert_map)
    plan = _random_plan(rng, num_slots)
    slot_nbytes = weights.slot_nbytes(ROW)
    size = BufferSize(StagingPool.layer_nbytes(len(plan.staged_slots), slot_nbytes), made.scratch_nbytes(ROW))
    pool = StagingPool(1, device_for(torch.device(device)), size)
    pool.allocate()
    (buffer,) = pool.buffers
    buffer.enter(BufferState.FILLING)
    buffer.lay_out(plan.staged_slots, slot_nbytes)
    for slot in plan.staged_slots:
        for staged in buffer.views(slot):
            staged.copy_(_random_bytes(rng, staged.numel()))
    maps = expert_map.layer_maps(new, ROW)
    commit = made.prepare(ROW, plan, buffer, maps)
    buffer.enter(BufferState.STAGED)
    return Layer(storages, weights, memory, expert_map, plan, maps, buffer, commit)


def random_tables(
    rng: np.random.Generator, placement: ExpertPlacement, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], MapTables]:
    """Draw an engine's tables: their memory, and some of the four, of any dtype, wider than needed, with gaps."""
    layers, physical = placement.physical_to_logical_map.shape
    logical = placement.num_logical_experts
    shapes = {
        "physical_to_logical_map": (layers, physical),
        "logical_to_all_physical_map": (layers, logical, int(rng.integers(physical - logical + 1, 2 * physical))),
        "logical_replica_count": (layers, logical),
        "logical_to_dispatch_physical_map": (layers, logical),
    }
    memory, tables = [], {}
    for name, shape in shapes.items():
        if rng.integers(3):
            around = [size + int(rng.integers(3)) for size in shape]
            dtype = (torch.int32, torch.int64)[rng.integers(2)]
            memory.append(torch.full(around, -7, dtype=dtype, device=device))
            tables[name] = memory[-1][tuple(slice(more - size, None) for more, size in zip(around, shape, strict=True))]
    return memory, MapTables(**tables)


def _random_tensor(
    rng: np.random.Generator, num_slots: int, device: torch.device | str, max_elements: int, *, aligned: bool
) -> tuple[Tensor, Slots]:
    """Return a storage of random bytes and a tensor in it: ``[slots, elements]``, transposed with padding, or apart."""
    dtype = _DTYPES[rng.integers(len(_DTYPES))]
    kind = rng.integers(3)
    elements = 1 if kind == 0 else int(rng.integers(1, max_elements))
    start, gap = (0, 0) if kind == 1 else (int(rng.integers(0, 20)), int(rng.integers(0, 20)))
    if aligned:
        elements, start, gap = -(-elements // 16) * 16, 0, 0
    stride = elements + gap
    storage = _random_bytes(rng, (start + num_slots * stride) * dtype.itemsize).to(device)
    tensor = storage.view(dtype).as_strided((num_slots, elements), (stride, 1), start)
    width = int(rng.integers(1, 5))
    if elements % width == 0 and not aligned:
        tensor = tensor.view(num_slots, width, elements // width).transpose(1, 2)[:, : max(1, elements // width - 1)]
        return storage, tensor if rng.integers(2) else [tensor[slot] for slot in rng.permutation(num_slots)]
    return storage, tensor


def _random_plan(rng: np.random.Generator, num_slots: int) -> LayerPlan:
    """Return a plan that stages some slots, of this rank too, and commits some to other slots too; perhaps none."""
    slots = rng.permutation(num_slots)
    staged = slots[: rng.integers(num_slots + 1)]
    own, received = np.split(np.sort(staged), [rng.integers(len(staged) + 1)])
    free_riders = slots[len(staged) :][: rng.integers(num_slots + 1)] if len(staged) else slots[:0]
    sources = [SlotSource.UNCHANGED] * num_slots
    for slot in own:
        sources[slot] = SlotSource.SAME_GPU
    for slot in received:
        sources[slot] = SlotSource.CROSS_NODE
    for slot in free_riders:
        sources[slot] = SlotSource.FREE_RIDER
    return LayerPlan(
        slot_sources=tuple(sources),
        local_copies=tuple(LocalCopy(int(rng.integers(num_slots)), int(slot)) for slot in own),
        recvs=tuple(Recv(0, 0, int(slot)) for slot in received),
        sends=(),
        fan_outs=tuple(FanOut(int(rng.choice(staged)), int(slot)) for slot in sorted(free_riders)),
    )


def _random_bytes(rng: np.random.Generator, size: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
