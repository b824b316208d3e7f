"""A layer's plan as exchanges: which bytes are sent from where, received into where, and pulled."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from async_eplb.staging import StagingBuffer
from async_eplb.transport.base import Exchange, Message, MessageGroup, Pull, Pulls
from async_eplb.update.layer import PlannedLayer
from async_eplb.weights import ExpertWeights


def exchanges(
    planned: PlannedLayer,
    buffer: StagingBuffer,
    weights: ExpertWeights,
    *,
    one_sided: Collection[int],
    in_turn: bool,
) -> tuple[Exchange, ...]:
    """Return what is exchanged for a layer: its first hop and, where the planner relays, a second one.

    :param buffer: laid out for the plan
    :param weights: live weights that are sent
    :param one_sided: peers that read this rank's live weights themselves, as it reads theirs
    :param in_turn: whether each source is read by one rank after another; then all ranks launch, even with no pulls
    """
    posted, plan = planned.posted, planned.plan
    sends: list[list[Message]] = [[] for _ in range(posted.num_groups)]
    recvs: list[list[Message]] = [[] for _ in range(posted.num_groups)]
    for send, group in zip(plan.sends, posted.send_groups, strict=True):
        if send.dst_rank not in one_sided:
            sends[group] += _tagged(send.logical_expert, send.dst_rank, weights.slot_views(planned.row, send.src_slot))
    for relay, group in zip(plan.relays, posted.relay_groups, strict=True):
        sends[group] += _tagged(relay.logical_expert, relay.dst_rank, buffer.views(relay.src_slot))
    pulls: list[Pull] = []
    for place in sorted(range(len(plan.recvs)), key=lambda place: plan.recvs[place].logical_expert):
        recv = plan.recvs[place]
        if recv.src_rank in one_sided:
            pulls.append(Pull(recv.src_rank, posted.recv_src_slots[place], recv.dst_slot))
        else:
            views = buffer.views(recv.dst_slot)
            recvs[posted.recv_groups[place]] += _tagged(recv.logical_expert, recv.src_rank, views)
    groups = tuple(MessageGroup(tuple(s), tuple(r)) for s, r in zip(sends, recvs, strict=True))
    first, second = groups[: posted.num_first], groups[posted.num_first :]
    takes_turns = in_turn and bool(one_sided)
    has_pulls = takes_turns or bool(pulls)
    hop = Exchange(planned.row, first, pulls=Pulls(tuple(pulls), buffer, takes_turns) if has_pulls else None)
    return (hop, Exchange(planned.row, second, hop=1)) if second else (hop,)


def _tagged(expert: int, peer: int, parts: Sequence[Tensor]) -> Iterator[Message]:
    """Yield a message for each tensor of an expert; tags tell a pair's messages of one layer and hop apart."""
    for index, data in enumerate(parts):
        yield Message(peer, expert * len(parts) + index, data)
