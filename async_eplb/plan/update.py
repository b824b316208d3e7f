"""Plan a whole update for one rank: all layers in one pass over arrays, handed out layer by layer."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from async_eplb.arguments import Whole, take
from async_eplb.errors import InvalidOptions, LayerCountMismatch
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement
from async_eplb.plan.layer_plan import FanOut, LayerPlan, LocalCopy, Recv, Send, SlotSource
from async_eplb.plan.planner import Planner
from async_eplb.plan.transfers import Ints, Transfers
from async_eplb.topology import EPTopology

_SOURCES = tuple(SlotSource)
_CODES = {source: code for code, source in enumerate(_SOURCES)}


class LayerColumns:
    """A table of integers, stored as columns, in which each layer has a range of rows.

    :param layer: ascending, ``[rows]``
    :param columns: each ``[rows]``
    """

    def __init__(self, layer: Ints, num_layers: int, *columns: Ints) -> None:
        self._starts = np.searchsorted(layer, np.arange(num_layers + 1)).tolist()
        self._columns = [column.tolist() for column in columns]

    def of(self, layer: int) -> Iterator[list[int]]:
        """Return one layer's rows of each column."""
        start, stop = self._starts[layer], self._starts[layer + 1]
        return (column[start:stop] for column in self._columns)


class UpdatePlan(Sequence[LayerPlan]):
    """A sequence of one rank's plan of each layer of an update; each is made when it is asked for.

    :param old: ``[layers, physical]``, -1 where empty
    :param new: ``[layers, physical]``
    :param transfers: of all ranks
    """

    def __init__(self, old: Ints, new: Ints, topology: EPTopology, rank: int, transfers: Transfers) -> None:
        self.transfers = transfers
        self.num_ranks = topology.num_ranks
        self._num_layers = len(old)
        slots = topology.slots_of(rank)
        t = transfers
        received, sent = np.flatnonzero(t.dst_rank == rank), np.flatnonzero(t.src_rank == rank)  # rows of transfers
        slot_of = t.layer[received] * topology.num_local_physical_experts + t.dst_slot[received]  # [received]
        self.received = received[np.argsort(slot_of)]
        """Rows of the transfers that this rank receives, in the order of its plans' ``recvs``."""
        self.sent = sent[~t.relayed[sent]]
        """Likewise of ``sends``."""
        self.passed_on = sent[t.relayed[sent]]
        """Likewise of ``relays``."""
        self._recvs = self.columns_of(
            self.received, *(c[self.received] for c in (t.logical_expert, t.src_rank, t.dst_slot))
        )
        self._sends, self._relays = (
            self.columns_of(rows, *(c[rows] for c in (t.logical_expert, t.dst_rank, t.src_slot)))
            for rows in (self.sent, self.passed_on)
        )
        self._classify(old[:, slots], new[:, slots])

    def _classify(self, before: Ints, after: Ints) -> None:
        """Find the source of each local slot, and what is copied on this rank.

        :param before: what this rank's slots hold now, ``[layers, slots]``
        :param after: the same after the update
        """
        t = self.transfers
        codes = np.full(after.shape, _CODES[SlotSource.UNCHANGED], dtype=np.int8)  # [layers, slots]
        codes[after == EMPTY_SLOT] = _CODES[SlotSource.EMPTY]
        codes[t.layer[self.received], t.dst_slot[self.received]] = np.where(
            t.same_node[self.received], _CODES[SlotSource.SAME_NODE], _CODES[SlotSource.CROSS_NODE]
        )
        # What changes and is not received has its expert on this rank: it is held, or another slot receives it.
        layer, slot = np.nonzero((after != before) & (codes == _CODES[SlotSource.UNCHANGED]))  # both [copied]
        wanted = after[layer, slot, None]  # [copied, 1]
        held = wanted == before[layer]  # [copied, slots]
        here = held.any(axis=1)  # [copied]
        codes[layer, slot] = np.where(here, _CODES[SlotSource.SAME_GPU], _CODES[SlotSource.FREE_RIDER])
        self._copies = LayerColumns(layer[here], self._num_layers, held[here].argmax(axis=1), slot[here])
        staged = (wanted[~here] == after[layer[~here]]).argmax(axis=1)  # [fan-outs]: the lowest slot, which receives
        self._fan_outs = LayerColumns(layer[~here], self._num_layers, staged, slot[~here])
        self._codes = [row.tolist() for row in codes]
        staged_codes = [_CODES[s] for s in (SlotSource.SAME_GPU, SlotSource.SAME_NODE, SlotSource.CROSS_NODE)]
        self._num_staged: list[int] = np.isin(codes, staged_codes).sum(axis=1).tolist()

    def columns_of(self, rows: npt.NDArray[np.intp], *columns: Ints) -> LayerColumns:
        """Cut columns, with an entry for each of these rows of the transfers, into layers."""
        return LayerColumns(self.transfers.layer[rows], self._num_layers, *columns)

    @property
    def staged_slot_counts(self) -> list[int]:
        """Number of this rank's slots that pass through staging, of each layer."""
        return list(self._num_staged)

    def __len__(self) -> int:
        return self._num_layers

    @overload
    def __getitem__(self, index: int) -> LayerPlan: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerPlan]: ...

    def __getitem__(self, index: int | slice) -> LayerPlan | list[LayerPlan]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(self._num_layers)[index]]
        layer = range(self._num_layers)[index]
        return LayerPlan(
            slot_sources=tuple([_SOURCES[code] for code in self._codes[layer]]),
            local_copies=tuple(map(LocalCopy, *self._copies.of(layer))),
            recvs=tuple(map(Recv, *self._recvs.of(layer))),
            sends=tuple(map(Send, *self._sends.of(layer))),
            fan_outs=tuple(map(FanOut, *self._fan_outs.of(layer))),
            relays=tuple(map(Send, *self._relays.of(layer))),
        )


def staged_slot_counts(old: Ints, new: Ints, topology: EPTopology) -> npt.NDArray[np.int64]:
    """Count the slots of each rank that pass through staging, of each layer: ``[layers, ranks]``.

    :param old: ``[layers, physical]``, -1 where empty
    :param new: ``[layers, physical]``
    """
    shape = (len(old), topology.num_ranks, topology.num_local_physical_experts)
    before, after = old.reshape(shape), new.reshape(shape)
    held = (after[..., :, None] == before[..., None, :]).any(axis=-1)  # [layers, ranks, slots]: copied on the rank
    first = (after[..., :, None] == after[..., None, :]).argmax(axis=-1)  # [layers, ranks, slots]
    receives = first == np.arange(shape[-1])  # [layers, ranks, slots]: if the expert is not held; once for the rank
    staged = (after != before) & (after != EMPTY_SLOT) & (held | receives)  # [layers, ranks, slots]
    return np.asarray(staged.sum(axis=-1))


def plan_update(
    old: ExpertPlacement,
    new: ExpertPlacement,
    topology: EPTopology,
    rank: int,
    *,
    layers: Sequence[int] | None = None,
    planner: Planner | None = None,
) -> UpdatePlan:
    """Plan all layers of an update for one rank.

    With the default planner each layer is what :func:`plan_layer` returns for it.

    :param layers: rows of the placements, in update order; all without it
    :param planner: how sources are chosen, equal on all ranks
    :returns: one plan for each layer, made when it is asked for
    :raises LayerCountMismatch: if the placements have different numbers of layers
    :raises InvalidPlacement: if one does not fit the topology
    :raises UnheldExpert: if ``new`` needs an expert that nobody holds under ``old``
    :raises InvalidOptions: if there is no such rank
    """
    require_update(old, new, topology)
    rank = take(rank, Whole(0, topology.num_ranks - 1), "rank", InvalidOptions)
    rows = slice(None) if layers is None else list(layers)
    before, after = old.physical_to_logical_map[rows], new.physical_to_logical_map[rows]
    return UpdatePlan(before, after, topology, rank, (planner or Planner()).transfers(before, after, topology))


def require_update(old: ExpertPlacement, new: ExpertPlacement, topology: EPTopology) -> None:
    """Check that two placements have the same layers and fit the topology.

    :raises LayerCountMismatch: if the placements have different numbers of layers
    :raises InvalidPlacement: if one does not fit the topology
    """
    if old.num_layers != new.num_layers:
        raise LayerCountMismatch(
            f"the new placement has {new.num_layers} layers, the old one {old.num_layers}",
            expected=old.num_layers,
            actual=new.num_layers,
        )
    old.require_fit(topology)
    new.require_fit(topology)
