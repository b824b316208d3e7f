"""The model: causal attention over each request's own keys and values, and expert layers spread over the ranks.

Its logits for a request are the same bits in any batch, on any rank and under any placement: token-wise work is done
in blocks (:mod:`serving.blocks`), attention in shapes that only the request decides, and the experts' results are added
in the router's order.
"""

from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from async_eplb import ExpertMap
from async_eplb.load.window import LoadWindow
from serving.blocks import BLOCK_ROWS, by_block, in_blocks, rms_norm, swiglu
from serving.checkpoint import dense_weights
from serving.config import ServingConfig
from serving.exchange import TokenExchange
from serving.sequences import Batch, Span


class MoEModel:
    """One rank of the model.

    :param experts: layer → ``w13``, its scale, ``w2``, its scale, each ``[local physical, ...]``; an updater may
        replace their slots between two passes
    :param expert_map: routing tables of the same layers, replaced together with the slots
    :param group: the model's group, of the device's kind
    :param load: counts the logical experts that this rank's tokens go to
    """

    def __init__(
        self,
        config: ServingConfig,
        experts: dict[int, list[Tensor]],
        expert_map: ExpertMap,
        group: ProcessGroup,
        load: LoadWindow,
    ) -> None:
        self.config = config.model
        self.device = experts[0][0].device
        self._dense = dense_weights(config.model, self.device)
        self._expert_weights = experts
        self._map = expert_map
        self._exchange = TokenExchange(group, len(experts[0][0]))
        self._load = load
        self._dispatch = config.dispatch
        self._num_passes = 0
        self.received_rows = [0] * config.model.num_layers
        """Rows that this rank's experts computed in the last pass, by layer."""

    @torch.inference_mode()
    def forward(self, batch: Batch, capacity: int) -> Tensor:
        """Return the logits of each sequence's next token, ``[sequences, vocabulary]``, and fill the caches.

        All ranks call this together, those without sequences too.

        :param capacity: the most rows that any rank has in this pass
        """
        rows = in_blocks(self._dense.embedding[batch.tokens])
        for layer in range(self.config.num_layers):
            rows = rows + self._attention(layer, rows, batch)
            rows = rows + self._experts(layer, rows, batch, capacity)
        self._num_passes += 1
        self._load.advance(batch.phases)
        for span in batch.spans:
            span.sequence.num_cached += span.end - span.start
        last = in_blocks(rows.flatten(0, 1)[batch.last_rows])
        logits = by_block(lambda block: rms_norm(block) @ self._dense.head, last)
        return logits.flatten(0, 1)[: len(batch.spans)]

    def _attention(self, layer: int, rows: Tensor, batch: Batch) -> Tensor:
        weights = self._dense.layers[layer]
        qkv = by_block(lambda block: rms_norm(block) @ weights.qkv, rows).flatten(0, 1)
        mixed = qkv.new_zeros(len(qkv), self.config.hidden)
        for span in batch.spans:
            mixed[span.start : span.end] = self._attend(layer, qkv[span.start : span.end], span)
        return by_block(lambda block: block @ weights.out, mixed.view_as(rows))

    def _attend(self, layer: int, qkv: Tensor, span: Span) -> Tensor:
        """Return one sequence's attention, ``[rows, hidden]``; distance is a linear bias (Press and others, 2021)."""
        heads, begin = self.config.num_heads, span.sequence.num_cached
        end = begin + len(qkv)
        query, key, value = (part.contiguous() for part in qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3))
        cache = span.sequence.cache[layer]
        cache[0, :, begin:end] = key
        cache[1, :, begin:end] = value
        scores = query @ cache[0, :, :end].mT / query.shape[-1] ** 0.5
        distance = torch.arange(begin, end, device=qkv.device)[:, None] - torch.arange(end, device=qkv.device)
        slopes = 0.5 ** torch.arange(1, heads + 1, device=qkv.device)
        scores = scores - slopes[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        mixed: Tensor = weights @ cache[1, :, :end]
        return mixed.transpose(0, 1).flatten(1)

    def _experts(self, layer: int, rows: Tensor, batch: Batch, capacity: int) -> Tensor:
        num_rows = len(batch.tokens)
        normed = by_block(rms_norm, rows)
        scores = by_block(lambda block: block @ self._dense.layers[layer].router, normed)
        best, chosen = scores.topk(self.config.top_k)
        gates = by_block(lambda block: block.softmax(-1), best).flatten(0, 1)
        chosen = chosen.flatten(0, 1)
        self._record(layer, chosen, batch)
        dispatched = self._exchange.dispatch(
            normed.flatten(0, 1)[:num_rows],
            self._physical(layer, chosen[:num_rows]),
            capacity * self.config.top_k,
        )
        computed = self._compute(layer, dispatched.rows, dispatched.slots)
        results = self._exchange.combine(computed, dispatched)
        mixed = torch.zeros_like(rows).flatten(0, 1)
        for choice in range(self.config.top_k):
            mixed[:num_rows] += gates[:num_rows, choice, None] * results[:, choice]
        return mixed.view_as(rows)

    def _physical(self, layer: int, chosen: Tensor) -> Tensor:
        """Choose a replica for each logical expert of each row, ``[rows, top_k]``."""
        if self._dispatch == "static":
            return self._map.logical_to_dispatch_physical_map[layer][chosen]
        row = torch.arange(len(chosen), device=chosen.device)[:, None] + self._num_passes
        turn = row % self._map.logical_replica_count[layer][chosen]
        return self._map.logical_to_all_physical_map[layer][chosen, turn]

    def _compute(self, layer: int, rows: Tensor, slots: Tensor) -> Tensor:
        """Return each row's result by the expert in its slot; rows of no slot stay zero."""
        results = rows.new_zeros(rows.shape)
        counts = torch.bincount(slots + 1, minlength=len(self._expert_weights[layer][0]) + 1).tolist()
        order = slots.argsort(stable=True)
        self.received_rows[layer] = sum(counts[1:])
        ends = list(accumulate(counts))
        for slot, (start, end) in enumerate(pairwise(ends)):
            if end > start:
                places = order[start:end]
                w13, w13_scale, w2, w2_scale = (tensor[slot] for tensor in self._expert_weights[layer])
                expert = partial(swiglu, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale)
                results[places] = by_block(expert, in_blocks(rows[places])).flatten(0, 1)[: len(places)]
        return results

    def _record(self, layer: int, chosen: Tensor, batch: Batch) -> None:
        """Count the experts of rows that are not padding, by phase."""
        number = torch.arange(len(chosen), device=chosen.device)
        decodes = number < batch.num_decode_rows
        rows = {"decode": decodes, "prefill": (number < len(batch.tokens)) & ~decodes}
        for phase in batch.phases:
            self._load.record(layer, chosen, phase=phase, valid=rows[phase])


def row_capacity(num_rows: int) -> int:
    """Return the rows that a pass makes room for, whose busiest rank has ``num_rows``: whole blocks."""
    return max(1, -(-num_rows // BLOCK_ROWS)) * BLOCK_ROWS
