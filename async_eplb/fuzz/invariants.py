"""Invariants, which are checked after every event of a simulated world."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt
from torch import Tensor

from async_eplb.expert_map import ExpertMap
from async_eplb.fuzz.model import TinyModel
from async_eplb.placement import EMPTY_SLOT
from async_eplb.topology import EPTopology
from async_eplb.updater import ExpertUpdater


class Invariant(Enum):
    """A condition that is true at all times."""

    WHOLE_LAYERS = "a layer is wholly old or new on every rank"
    SAME_MAPS = "all live ranks use the same map in the same step"
    LIVE_REPLICAS = "every logical expert has a live replica"
    ONE_STATE = "no buffer is used in two states"
    STAGED_EVERYWHERE = "no commit without staged everywhere"
    ENDS_IN_TIME = "an update ends within its deadline"
    TYPED_ERRORS = "every failure is a typed error"
    UNDISTURBED = "what nothing disturbs does not fail"
    RECOVERED = "after recovery all survivors serve the same placement"


class Violation(Exception):
    """An invariant is violated."""

    def __init__(self, invariant: Invariant, message: str) -> None:
        super().__init__(f"{invariant.value}: {message}")
        self.invariant = invariant


@dataclass(slots=True)
class Watched:
    """What the checker reads of one rank, and what it has seen of it.

    :param memory: its live weights: uint8 ``[layers, slots, bytes]``
    :param serving: it is inside a forward pass, in which its layers must not change
    :param recovering: it is in a recovery, in which its maps may differ from other ranks'
    :param gone: it was killed, or has left its updater; it is not checked any more
    :param map: its published map: int64 ``[layers, physical]``, in place
    :param generation: how often each of its layers was replaced: int64 ``[layers]``, in place
    :param seen: what :meth:`content` returned when it was last checked
    :param generations: ``generation`` when it was last checked
    """

    rank: int
    updater: ExpertUpdater
    memory: npt.NDArray[np.uint8]
    serving: bool = False
    recovering: bool = False
    gone: bool = False
    map: npt.NDArray[np.int64] = field(init=False)
    generation: npt.NDArray[np.int64] = field(init=False)
    seen: bytes = b""
    generations: tuple[int, ...] = ()
    _live: tuple[memoryview, ...] = field(init=False)

    def __post_init__(self) -> None:
        table: ExpertMap = self.updater.expert_map
        self.map = table.physical_to_logical_map.numpy()
        self.generation = table.layer_generation.numpy()
        self.generations = tuple(self.generation.tolist())
        self._live = (self.memory.data, self.map.data, self.generation.data)

    def content(self) -> bytes:
        """Return all bytes that a commit may change: weights, map and generations."""
        return b"".join(self._live)


@dataclass(frozen=True, slots=True)
class _Staged:
    """A staged layer, and the bytes that it had when it was staged.

    :param mark: (generation of the update, layer)
    :param live: the bytes of ``memory`` as they are now
    """

    mark: tuple[int, int]
    memory: Tensor
    live: memoryview
    content: bytes


class Checker:
    """Compares the ranks of a world with the invariants."""

    def __init__(self, model: TinyModel, topology: EPTopology, ranks: Sequence[Watched]) -> None:
        self._model = model
        self._topology = topology
        self.ranks = ranks
        self._steps: dict[int, tuple[int, bytes]] = {}
        self._kept: dict[tuple[int, int], _Staged] = {}
        self.num_checks = 0
        for watched in ranks:
            watched.seen = watched.content()

    def after_event(self, rank: int | None) -> None:
        """Check what an event can have changed.

        :param rank: whose event it was; all ranks are checked without one
        :raises Violation: if an invariant does not hold
        """
        for watched in self.ranks if rank is None else (self.ranks[rank],):
            if watched.gone:
                continue
            self._check_buffers(watched)
            content = watched.content()
            if content != watched.seen:
                watched.seen = content
                self._check_change(watched)

    def passes(self, watched: Watched, step: int) -> None:
        """Compare the maps that a rank uses in a forward pass with those that other ranks use in it.

        :raises Violation: if another rank used other maps in the same pass, or a layer is partly old and partly new
        """
        self.after_event(watched.rank)
        self.check_layers(watched)
        used = watched.map.tobytes()
        other, others = self._steps.setdefault(step, (watched.rank, used))
        if used != others:
            raise Violation(
                Invariant.SAME_MAPS,
                f"in step {step} rank {watched.rank} uses other maps than rank {other}:\n{watched.map}\nand "
                f"{np.frombuffer(others, dtype=np.int64).reshape(watched.map.shape)}",
            )

    def check_layers(self, watched: Watched) -> None:
        """Compare every byte of a rank's slots with its map, except in a layer whose commit failed half way there.

        :raises Violation: if the bytes of a slot are not those of the expert in the map
        """
        self.num_checks += 1
        experts = watched.map[:, self._topology.slots_of(watched.rank)]
        differs = watched.memory != self._model.slots(experts)
        if not differs.any():
            return
        wrong = (experts != EMPTY_SLOT) & differs.any(axis=-1)
        for layer in np.flatnonzero(wrong.any(axis=1)):
            if layer not in self._half_committed(watched):
                raise Violation(
                    Invariant.WHOLE_LAYERS,
                    f"rank {watched.rank}, layer {layer}: slots {np.flatnonzero(wrong[layer]).tolist()} are not "
                    f"experts {experts[layer].tolist()}",
                )

    def check_replicas(self, watched: Watched) -> None:
        """Check that each expert has a replica in the map in use.

        :raises Violation: if one has none
        """
        for layer in range(watched.map.shape[0]):
            missing = set(range(self._model.num_experts)) - set(watched.map[layer].tolist())
            if missing:
                raise Violation(
                    Invariant.LIVE_REPLICAS, f"rank {watched.rank}, layer {layer}: experts {sorted(missing)} have none"
                )

    @staticmethod
    def _half_committed(watched: Watched) -> set[int]:
        """Return the layer whose commit failed on this rank, if there is one."""
        error = watched.updater.outlook.held
        return set() if error is None else {getattr(error, "layer", -1)}

    def _check_change(self, watched: Watched) -> None:
        self.check_layers(watched)
        before, now = watched.generations, tuple(watched.generation.tolist())
        watched.generations = now
        changed = [layer for layer, (one, other) in enumerate(zip(before, now, strict=True)) if one != other]
        if watched.recovering:
            return
        self.check_replicas(watched)
        if changed and watched.serving:
            raise Violation(
                Invariant.SAME_MAPS, f"rank {watched.rank}: layers {changed} were committed in the middle of a pass"
            )
        for layer in changed:
            for other in self.ranks:
                if not self._has_staged(other, layer, now[layer]):
                    raise Violation(
                        Invariant.STAGED_EVERYWHERE,
                        f"rank {watched.rank} committed layer {layer}, which rank {other.rank} has not staged",
                    )

    @staticmethod
    def _has_staged(watched: Watched, layer: int, generation: int) -> bool:
        if watched.gone or int(watched.generation[layer]) >= generation:
            return True
        run = watched.updater.running or watched.updater.failed
        return run is not None and layer in run.progress.rows[: run.progress.staged]

    def _check_buffers(self, watched: Watched) -> None:
        """Check that staged layers have buffers of their own, whose bytes do not change until they are committed."""
        run = watched.updater.running
        if run is None or run.progress.staged == run.progress.finished:
            return
        finished = run.progress.finished
        staged = run.progress.layers[finished : run.progress.staged]
        buffers = [layer.buffer.index for layer in staged]
        if len(set(buffers)) < len(buffers):
            raise Violation(Invariant.ONE_STATE, f"rank {watched.rank}: staged layers share buffers {buffers}")
        for number, layer in enumerate(staged, finished):
            key, mark = (watched.rank, layer.buffer.index), (run.update.generation, layer.planned.row)
            memory, known = layer.buffer.memory, self._kept.get(key)
            if known is None or known.mark != mark:
                live = memory.numpy().data
                self._kept[key] = _Staged(mark, memory, live, bytes(live))
            elif memory is not known.memory or bytes(known.live) != known.content:
                raise Violation(
                    Invariant.ONE_STATE,
                    f"rank {watched.rank}: {layer.buffer!r} was written while layer {layer.planned.row}, number "
                    f"{number}, was staged in it",
                )
