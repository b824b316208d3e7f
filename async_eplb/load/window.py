"""A window over the last steps: tokens of each logical expert, counted on the device while the model serves."""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from async_eplb.arguments import Whole, take
from async_eplb.device import record_on
from async_eplb.errors import InvalidLoad, InvalidOptions
from async_eplb.load.source import LoadGroup, LoadSnapshot
from async_eplb.load.value import PHASES, ExpertLoad
from async_eplb.modes import outside_modes

_IGNORED = 0
"""Column of a table of counts for tokens to ignore: they are counted there, since leaving them out would need a mask
whose size the host would have to wait for."""
_FIRST_EXPERT = 1
"""Column of logical expert 0."""

_INTEGERS = frozenset(
    {
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    }
)


class PhysicalMap(Protocol):
    """A map from physical experts to logical ones, integers ``[layers, physical]``; an ``ExpertMap`` is one."""

    @property
    def physical_to_logical_map(self) -> Tensor:
        """The map of all layers, as it is now."""
        ...


class LoadWindow:
    """Counts tokens of each expert on the device, over the last steps.

    :meth:`record` and :meth:`advance` only launch device work: they never wait for the device and allocate no memory
    that stays. They use buffers whose addresses never change, which the constructor allocates, so that :meth:`record`
    can be part of a CUDA graph. Call them where the model runs, on its stream. Counts of a step are in the window once
    :meth:`advance` has ended the step.

    The window takes ``4 * window_steps * phases * layers * (experts + 2)`` bytes of the device.

    :param window_steps: steps that the window covers
    :param phases: kinds of steps that are counted apart
    :param expert_map: from physical experts to logical ones; only needed to record physical ones
    :raises InvalidOptions: if a number is not positive, there is no phase, or the map has another number of layers
    """

    def __init__(
        self,
        num_layers: int,
        num_logical_experts: int,
        window_steps: int,
        device: torch.device | str = "cpu",
        *,
        phases: Sequence[str] = PHASES,
        expert_map: PhysicalMap | None = None,
    ) -> None:
        num_layers = take(num_layers, Whole(1), "num_layers", InvalidOptions)
        num_logical_experts = take(num_logical_experts, Whole(1), "num_logical_experts", InvalidOptions)
        window_steps = take(window_steps, Whole(1), "window_steps", InvalidOptions)
        if not phases or len(set(phases)) != len(phases):
            raise InvalidOptions(f"phases is {phases!r}; it must name each phase once", option="phases")
        if expert_map is not None and len(expert_map.physical_to_logical_map) != num_layers:
            raise InvalidOptions(
                f"expert_map has {len(expert_map.physical_to_logical_map)} layers, and num_layers is {num_layers}",
                option="expert_map",
            )
        self._phases = {phase: index for index, phase in enumerate(phases)}
        self._expert_map = expert_map
        self._num_logical_experts = num_logical_experts
        self._beyond = _FIRST_EXPERT + num_logical_experts
        # Columns of a table of counts: ignored tokens, logical experts in order, experts beyond the model.
        shape = (len(phases), num_layers, self._beyond + 1)
        with outside_modes():
            self._step = torch.zeros(shape, dtype=torch.int32, device=device)
            self._ring = torch.zeros((window_steps, *shape), dtype=torch.int32, device=device)
            self._total = torch.zeros(shape, dtype=torch.int64, device=device)
            self._one = torch.ones((), dtype=torch.int32, device=device)
        self._on_host(len(phases))  # torch keeps pinned memory, so that the serving thread finds some
        self._phases_of_steps: deque[frozenset[str]] = deque(maxlen=window_steps)
        self._next = 0

    def num_steps(self, phase: str | None = None) -> int:
        """Return the number of steps in the window, of all phases or one; can be called in any thread."""
        steps = tuple(self._phases_of_steps)  # a copy, for the serving thread appends meanwhile
        return sum(phase is None or phase in phases for phases in steps)

    def record(
        self,
        layer: int,
        experts: Tensor,
        *,
        phase: str = "decode",
        physical: bool = False,
        valid: Tensor | None = None,
    ) -> None:
        """Count the tokens of one layer in the current step.

        :param experts: the experts that tokens go to, integers of any type and shape, ``[tokens, top_k]`` for example;
            negative ones are ignored
        :param physical: ``experts`` are physical; they are counted as the logical ones of the map as it is now
        :param valid: False or 0 for tokens to ignore (padding, dummies): bool or integers, of the leading dimensions
            of ``experts``
        :raises InvalidOptions: if the phase is not counted, or there is no map to fold with
        :raises InvalidLoad: if a tensor is none of integers, on another device, or of another shape; or there is no
            such layer
        """
        step = self._step[self._phase(phase)]  # [layers, columns]
        if not 0 <= layer < len(step):
            raise InvalidLoad(f"there is no layer {layer}: this window counts layers 0 to {len(step) - 1}")
        self._require("experts", experts, _INTEGERS)
        logical = experts.long()
        if experts.dtype is torch.uint64:  # whose upper half is negative now, and beyond any model
            logical = logical.masked_fill(logical < 0, torch.iinfo(torch.int64).max)
        if physical:
            logical = self._folded(logical, self._map()[layer])
        columns = logical.clamp(-1, self._num_logical_experts) + _FIRST_EXPERT  # -1 becomes _IGNORED
        if valid is not None:
            self._require("valid", valid, {torch.bool, *_INTEGERS})
            if valid.shape != experts.shape[: valid.ndim]:
                raise InvalidLoad(
                    f"valid has shape {list(valid.shape)}; it must be the leading dimensions of experts, which has "
                    f"{list(experts.shape)}"
                )
            ignored = valid.reshape(valid.shape + (1,) * (experts.ndim - valid.ndim)) == 0  # [tokens, ..., 1]
            columns = columns.masked_fill(ignored, _IGNORED)
        columns = columns.reshape(-1)  # [recorded experts]
        step[layer].scatter_add_(0, columns, self._one.expand(len(columns)))

    def record_counts(self, counts: Tensor, *, physical: bool = True, phase: str = "decode") -> None:
        """Add the counts of all layers to the current step, for engines that count by themselves.

        :param counts: tokens of each expert, integers ``[layers, physical]``; they are counted as the logical ones of
            the map as it is now, and those of empty slots are ignored
        :param physical: False if ``counts`` are ``[layers, logical]``
        :raises InvalidOptions: if the phase is not counted, or there is no map to fold with
        :raises InvalidLoad: if ``counts`` is no such tensor, or on another device
        """
        step = self._step[self._phase(phase)]  # [layers, columns]
        self._require("counts", counts, _INTEGERS)
        table = self._map() if physical else None
        shape = (len(step), self._num_logical_experts) if table is None else table.shape
        if counts.shape != shape:
            experts = "logical" if table is None else "physical"
            raise InvalidLoad(f"counts has shape {list(counts.shape)}; [layers, {experts}] is {list(shape)} here")
        if table is None:
            step[:, _FIRST_EXPERT : self._beyond].add_(counts.to(step.dtype))
        else:
            columns = table.long().clamp(-1, self._num_logical_experts) + _FIRST_EXPERT  # -1 becomes _IGNORED
            step.scatter_add_(1, columns, counts.to(step.dtype))

    def advance(self, phases: Collection[str] | None = None) -> None:
        """End a step: add its counts to the window, and remove those of the oldest step.

        :param phases: phases that the step had; all without it. A load of one phase covers only steps that had it
        """
        oldest = self._ring[self._next]
        self._total.add_(self._step).sub_(oldest)
        oldest.copy_(self._step)
        self._step.zero_()
        self._next = (self._next + 1) % len(self._ring)
        self._phases_of_steps.append(frozenset(self._phases if phases is None else phases))

    def snapshot(self, phase: str | None = None) -> LoadSnapshot:
        """Begin to copy the counts of the window to the host, on the current stream; return at once.

        :raises InvalidOptions: if the phase is not counted
        """
        counted = self._total if phase is None else self._total[self._phase(phase)][None]  # [phases, layers, columns]
        host = self._on_host(len(counted))
        host.copy_(counted, non_blocking=True)
        return LoadSnapshot(host[..., _FIRST_EXPERT:], record_on(counted.device), self.num_steps(phase), phase)

    async def gather(self, group: LoadGroup, phase: str | None = None) -> ExpertLoad:
        """Return the load of all ranks together, which is equal on every rank. All ranks call this together.

        The snapshot is taken before this first waits: call it from the serving thread, or while the stream of
        :meth:`record` is current. A rebalancer has it taken inside ``step()``.

        :raises InvalidLoad: if experts beyond the model's were recorded
        :raises InvalidOptions: if the phase is not counted
        """
        return await self.snapshot(phase).summed(group)

    def _require(self, name: str, tensor: Tensor, dtypes: Collection[torch.dtype]) -> None:
        """Check what is known of a tensor without waiting for its device.

        :raises InvalidLoad: if it is no tensor of this device and of one of the dtypes
        """
        if not isinstance(tensor, Tensor):
            raise InvalidLoad(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.dtype not in dtypes:
            raise InvalidLoad(f"{name} holds {tensor.dtype}; it must hold integers")
        if tensor.device != self._step.device:
            raise InvalidLoad(f"{name} is on {tensor.device}, and this window counts on {self._step.device}")

    def _map(self) -> Tensor:
        """Return the map from physical experts to logical ones as it is now: ``[layers, physical]``."""
        if self._expert_map is None:
            raise InvalidOptions("physical experts are mapped by expert_map; it is None", option="expert_map")
        return self._expert_map.physical_to_logical_map

    def _folded(self, physical: Tensor, table: Tensor) -> Tensor:
        """Return the logical experts of physical ones, in their shape: -1 for negative ones and empty slots.

        Physical experts beyond the table become a logical expert beyond the model's, which is counted as such.

        :param table: ``[physical]``
        """
        logical = table[physical.clamp(0, len(table) - 1)].long()
        logical = logical.masked_fill(physical >= len(table), self._num_logical_experts)
        return logical.masked_fill(physical < 0, -1)

    def _on_host(self, num_phases: int) -> Tensor:
        """Return host memory for counts, pinned if there is a device: int64 ``[phases, layers, columns]``."""
        shape = (num_phases, *self._total.shape[1:])
        return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=self._total.is_cuda)

    def _phase(self, phase: str) -> int:
        if phase not in self._phases:
            counted = ", ".join(self._phases)
            raise InvalidOptions(f"phase is {phase!r}; this window counts {counted}", option="phase")
        return self._phases[phase]
