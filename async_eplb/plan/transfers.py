"""Find which rank needs which expert, and who holds it, in all layers at once; the columns of all transfers.

All tables are sorted by one number for each (layer, expert, rank, slot), so that what belongs together is a range, and
ranges are found by binary search: no loop over layers, experts or slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from async_eplb.errors import UnheldExpert
from async_eplb.placement import EMPTY_SLOT
from async_eplb.topology import EPTopology

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Transfers:
    """All transfers of an update, of all layers and ranks, as columns, in the order in which they are posted.

    A transfer is one expert of one layer that one rank sends to another. Columns have shape ``[transfers]``. Within a
    layer what is relayed comes last; then the order is ascending expert, same-node before cross-node destinations, each
    in rank order.

    :param layer: index of the layer in the update
    :param src_slot: where the sender has the expert: live, or in staging where ``relayed``
    :param dst_slot: lowest slot of the receiver that gets it
    :param same_node: whether both ranks are on one node
    :param relayed: whether the sender itself receives the expert first, so that both must not be posted together
    """

    layer: Ints
    logical_expert: Ints
    src_rank: Ints
    src_slot: Ints
    dst_rank: Ints
    dst_slot: Ints
    same_node: Bools
    relayed: Bools

    def take(self, rows: npt.NDArray[np.intp] | Bools) -> "Transfers":
        """Return a selection or another order of the entries."""
        return Transfers(*(getattr(self, column)[rows] for column in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Holders:
    """All ranks that hold an expert before an update, ascending by (layer, expert, rank). Columns are ``[holders]``.

    :param slot: lowest slot of the rank that has the expert
    """

    rank: Ints
    slot: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """All receives that an update needs, one for each (layer, expert, rank), and the ranks that may send each.

    Columns have shape ``[needs]`` and are in the order in which transfers are posted. The ranks that may send the
    expert, those of the own node if any of them holds it, are the ``count`` entries from ``first`` of ``holders``.
    """

    layer: Ints
    logical_expert: Ints
    rank: Ints
    slot: Ints
    same_node: Bools
    first: npt.NDArray[np.intp]
    count: npt.NDArray[np.intp]
    holders: Holders

    def served_by(self, holder: npt.NDArray[np.intp]) -> Transfers:
        """Return the transfers if each need is served by this holder, ``[needs]``."""
        return Transfers(
            layer=self.layer,
            logical_expert=self.logical_expert,
            src_rank=self.holders.rank[holder],
            src_slot=self.holders.slot[holder],
            dst_rank=self.rank,
            dst_slot=self.slot,
            same_node=self.same_node,
            relayed=np.zeros(len(holder), dtype=np.bool_),
        )


def find_needs(old: Ints, new: Ints, topology: EPTopology) -> Needs:
    """List what all ranks must receive.

    :param old: ``[layers, physical]``, -1 where empty
    :param new: ``[layers, physical]``
    :raises UnheldExpert: if ``new`` needs an expert in a layer where nobody holds it under ``old``
    """
    num_experts = max(int(old.max(initial=0)), int(new.max(initial=0))) + 1
    slots = topology.num_local_physical_experts
    # One number for each (layer, expert, rank), ascending: which ranks hold it, and which want it in a changed slot.
    held_key, held_slot = _lowest_slots(old, old != EMPTY_SLOT, num_experts, slots)  # [holders]
    key, slot = _lowest_slots(new, (new != old) & (new != EMPTY_SLOT), num_experts, slots)  # [wanted]
    own = np.searchsorted(held_key, key)  # [wanted]: where the rank itself would be among the holders
    missing = held_key.take(own, mode="clip") != key if len(held_key) else np.ones(len(key), dtype=np.bool_)
    key, slot, own = key[missing], slot[missing], own[missing]  # [needs] from here on

    # Without the rank's place in its node, the number is that of (layer, expert, node): holders of the own node.
    near, near_held = key // topology.num_ranks_per_node, held_key // topology.num_ranks_per_node
    first, count = _ranges(near_held, near, own)  # [needs]
    same_node = count > 0  # [needs]
    expert = key // topology.num_ranks  # [needs]: without the rank, that of (layer, expert)
    if not same_node.all():
        far = ~same_node  # [needs]: any holder of the layer's expert will do
        first[far], count[far] = _ranges(held_key // topology.num_ranks, expert[far], own[far])
        order = np.argsort(expert * 2 + far, kind="stable")  # of an expert, same-node destinations first
        key, slot, expert = key[order], slot[order], expert[order]
        first, count, same_node = first[order], count[order], same_node[order]
    layer = expert // num_experts  # [needs]
    needs = Needs(
        layer=layer,
        logical_expert=expert - layer * num_experts,
        rank=key - expert * topology.num_ranks,
        slot=slot,
        same_node=same_node,
        first=first,
        count=count,
        holders=Holders(held_key % topology.num_ranks, held_slot),
    )
    _require_holders(needs)
    return needs


def _ranges(held: Ints, wanted: Ints, place: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Find the range of equal entries of ``held`` for each wanted one: (first, count), 0 where there is none.

    :param held: ascending, ``[holders]``
    :param wanted: ``[needs]``
    :param place: where something that belongs to each wanted entry would be inserted, so that its range is beside it,
        ``[needs]``
    """
    if not len(held):
        return np.zeros_like(place), np.zeros_like(place)
    starts = np.flatnonzero(np.concatenate([[True], held[1:] != held[:-1]]))  # [ranges]
    sizes = np.diff(starts, append=len(held))  # [ranges]
    after = held.take(place, mode="clip") == wanted  # [needs]: the range goes on, or begins, at the place
    found = np.where(after, place, place - 1)  # [needs]: one entry of the range, if there is any
    found_any = held.take(found, mode="clip") == wanted  # [needs]
    first, count = (np.repeat(column, sizes).take(found, mode="clip") for column in (starts, sizes))  # [needs]
    return first, np.where(found_any, count, 0)


def in_chunks(needs: Needs) -> npt.NDArray[np.intp]:
    """Choose holders as :func:`plan_layer` does: destinations in rank order, cut into one chunk for each source.

    :returns: ``[needs]``
    """
    holder = needs.first.copy()  # [needs]
    several = np.flatnonzero(needs.count > 1)  # needs with a choice
    if not len(several):
        return holder
    first, count, same_node = needs.first[several], needs.count[several], needs.same_node[several]  # [several]
    same_sources = (first[1:] == first[:-1]) & (count[1:] == count[:-1]) & (same_node[1:] == same_node[:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same_sources]))  # [runs of needs with the same sources]
    sizes = np.diff(starts, append=len(several))  # [runs]
    index = np.arange(len(several)) - np.repeat(starts, sizes)  # [several]: within the run
    # Of ``count`` chunks, the first ``longer`` ones have ``size + 1`` destinations and the others ``size``.
    size, longer = np.divmod(np.repeat(sizes, sizes), count)  # [several]
    in_longer = index < longer * (size + 1)  # [several]
    holder[several] += np.where(in_longer, index // (size + 1), (index - longer) // np.maximum(size, 1))
    return holder


def _lowest_slots(maps: Ints, chosen: Bools, num_experts: int, slots: int) -> tuple[Ints, Ints]:
    """Return ascending keys, (layer · experts + expert) · ranks + rank, and the lowest of the chosen slots of each.

    :param maps: ``[layers, physical]``
    :param chosen: ``[layers, physical]``
    """
    num_layers, physical = maps.shape
    fits = 2 * num_layers * num_experts * physical < np.iinfo(np.int32).max  # sorting half the bytes is faster
    dtype = np.dtype(np.int32 if fits else np.int64)
    expert: npt.NDArray[Any] = maps.astype(dtype) + np.arange(num_layers, dtype=dtype)[:, None] * num_experts
    # [chosen]: with the physical expert, which is rank · slots + slot, so that the slot is the lowest digit of the key
    keys: Ints = np.sort((expert * physical + np.arange(physical, dtype=dtype))[chosen])
    owner = keys // slots  # [chosen]: without the slot
    lowest = np.ones(len(keys), dtype=np.bool_)  # [chosen]: first of its owner
    np.not_equal(owner[1:], owner[:-1], out=lowest[1:])
    owner, keys = owner[lowest], keys[lowest]  # [owners]
    return owner, keys - owner * slots


def _require_holders(needs: Needs) -> None:
    """Check that somebody holds each expert that is needed."""
    unheld = np.flatnonzero(needs.count == 0)
    if len(unheld):
        layer, expert = int(needs.layer[unheld[0]]), int(needs.logical_expert[unheld[0]])
        raise UnheldExpert(
            f"layer {layer}: the new placement needs logical expert {expert}, which nobody holds under the old one",
            logical_expert=expert,
        )
