"""Weights that every rank can compute for itself: functions of the seed, the layer and the logical expert.

The router is made so that a token's topic decides most of its experts, and the output head so that answers mostly stay
in their prompt's topic: traffic about few topics makes few experts hot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb import EPTopology, ExpertPlacement
from serving.config import ModelConfig

_TOPIC = 1.2
"""Length of the part of an embedding that all tokens of a topic share; the token's own part has length 1."""
_BRANCH = 0.5
"""Length of what an attention or expert layer adds to the residual stream, about."""

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Weights of one layer that every rank has, float32.

    - ``qkv`` ``[hidden, 3 * hidden]``
    - ``out`` ``[hidden, hidden]``
    - ``router`` ``[hidden, logical]``
    """

    qkv: Tensor
    out: Tensor
    router: Tensor


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """All weights that every rank has.

    - ``embedding`` ``[vocabulary, hidden]``
    - ``head`` ``[hidden, vocabulary]``
    """

    embedding: Tensor
    head: Tensor
    layers: tuple[DenseLayer, ...]


def dense_weights(config: ModelConfig, device: torch.device | str = "cpu") -> DenseWeights:
    """Compute everything but the experts."""

    def tensor(values: _Array) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    rng = np.random.default_rng([config.seed, 0])
    topics = _unit(rng.standard_normal((config.num_topics, config.hidden)))
    width = config.vocabulary // config.num_topics
    embedding = _TOPIC * topics.repeat(width, axis=0) + _unit(rng.standard_normal((config.vocabulary, config.hidden)))
    followers = np.concatenate([start * width + rng.permutation(width) for start in range(config.num_topics)])
    layers = tuple(_dense_layer(config, topics, layer) for layer in range(config.num_layers))
    return DenseWeights(
        tensor(embedding),
        tensor(embedding[followers].T),
        tuple(DenseLayer(*(tensor(values) for values in layer)) for layer in layers),
    )


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> tuple[Tensor, ...]:
    """Compute one expert: ``w13``, its scale, ``w2``, its scale, shaped as :func:`serving.blocks.swiglu` takes them."""
    rng = np.random.default_rng([config.seed, 1 + layer, expert])
    w13 = rng.standard_normal((2 * config.intermediate, config.hidden)) / config.hidden**0.5
    w2 = rng.standard_normal((config.hidden, config.intermediate)) * 2 * _BRANCH / config.intermediate**0.5
    scales = (rng.uniform(0.5, 1.5, 2 * config.intermediate), rng.uniform(0.5, 1.5, config.hidden) / config.hidden**0.5)
    weights = (torch.from_numpy(values.astype(np.float32)) for values in (w13, scales[0], w2, scales[1]))
    w13_tensor, w13_scale, w2_tensor, w2_scale = weights
    return w13_tensor.bfloat16(), w13_scale, w2_tensor.bfloat16(), w2_scale


def local_experts(
    config: ModelConfig,
    placement: ExpertPlacement,
    topology: EPTopology,
    rank: int,
    device: torch.device | str = "cpu",
) -> dict[int, list[Tensor]]:
    """Compute a rank's expert weights: layer → tensors ``[local physical, ...]``; empty slots hold zeros."""
    held = placement.physical_to_logical_map[:, topology.slots_of(rank)]
    return {layer: _stacked(config, layer, row.tolist(), device) for layer, row in enumerate(held)}


def _stacked(config: ModelConfig, layer: int, experts: Sequence[int], device: torch.device | str) -> list[Tensor]:
    empty = tuple(torch.zeros_like(tensor) for tensor in expert_tensors(config, layer, 0))
    slots = [expert_tensors(config, layer, expert) if expert >= 0 else empty for expert in experts]
    return [torch.stack(tensors).to(device) for tensors in zip(*slots, strict=True)]


def _dense_layer(config: ModelConfig, topics: _Array, layer: int) -> tuple[_Array, _Array, _Array]:
    rng = np.random.default_rng([config.seed, 1 + layer])
    hidden = config.hidden
    per_topic = config.num_logical_experts // config.num_topics
    topic_of_expert = rng.permutation(np.arange(config.num_topics).repeat(per_topic))
    router = 0.5 * topics[topic_of_expert] + _unit(rng.standard_normal((config.num_logical_experts, hidden)))
    qkv = rng.standard_normal((hidden, 3 * hidden)) / hidden**0.5
    out = rng.standard_normal((hidden, hidden)) * _BRANCH / hidden
    return qkv, out, router.T


def _unit(rows: _Array) -> _Array:
    length: _Array = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / length
