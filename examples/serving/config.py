"""What a server is made of: sizes of the model, limits of the engine."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from async_eplb import EPTopology, ExpertPlacement

LANES = 16
"""Widths are multiples of this many numbers, so that no row of a block starts inside a vector register."""

DispatchAlgorithm = Literal["static", "round_robin"]
PolicyName = Literal["global", "hierarchical", "incremental"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the model.

    :param seed: of all weights
    :param num_topics: regions of the vocabulary; the router sends the tokens of one mostly to the same few experts
    :param max_context: tokens of a prompt and its answer together
    :raises ValueError: if the sizes do not fit together
    """

    seed: int = 0
    vocabulary: int = 512
    num_topics: int = 8
    num_layers: int = 4
    hidden: int = 64
    num_heads: int = 4
    num_logical_experts: int = 16
    top_k: int = 2
    intermediate: int = 64
    max_context: int = 128

    def __post_init__(self) -> None:
        rules = {
            "hidden": self.hidden % (LANES * self.num_heads) == 0,
            "intermediate": self.intermediate % LANES == 0,
            "vocabulary": self.vocabulary % (LANES * self.num_topics) == 0,
            "num_logical_experts": self.num_logical_experts % self.num_topics == 0,
            "top_k": 1 <= self.top_k <= self.num_logical_experts,
        }
        wrong = [name for name, holds in rules.items() if not holds]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of {self} do not fit; see the rules in {__name__}")

    def tokens_of(self, topic: int) -> range:
        """Return the region of the vocabulary that a topic is."""
        width = self.vocabulary // self.num_topics
        return range(topic * width, (topic + 1) * width)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine on each rank.

    :param max_batch: sequences that run at once
    :param max_pass_tokens: rows of a forward pass: one for each running sequence, and whole prompts
    :param max_queue: requests that wait
    """

    max_batch: int = 8
    max_pass_tokens: int = 64
    max_queue: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancingConfig:
    """How experts follow the load while the server answers.

    :param policy: where experts should go
    :param every_steps: passes after which a rebalance begins unasked; None: only when asked to
    :param max_nbytes_per_step: bytes that the busiest rank sends or receives for each pass at most; None: no limit
    :param log_dir: where each rank writes its events, as JSON lines; None: nowhere
    """

    policy: PolicyName = "incremental"
    every_steps: int | None = None
    max_nbytes_per_step: int | None = None
    log_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """What all ranks of a server have in common.

    :param slots_per_expert: slots of all ranks together, in each layer, over the number of experts; at least 1
    :param dispatch: ``"static"``: a rank sends an expert's tokens to one replica, as the dispatch map says;
        ``"round_robin"``: to each replica in turn
    :param window_passes: that the measured load covers
    """

    num_nodes: int = 1
    slots_per_expert: float = 1.5
    dispatch: DispatchAlgorithm = "static"
    window_passes: int = 40
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.slots_per_expert < 1:
            raise ValueError(f"slots_per_expert is {self.slots_per_expert}; every expert needs a slot")

    def topology(self, num_ranks: int) -> EPTopology:
        """Return the shape of the EP group."""
        slots = math.ceil(self.slots_per_expert * self.model.num_logical_experts / num_ranks)
        return EPTopology(num_ranks, self.num_nodes, slots)

    def first_placement(self, num_ranks: int) -> ExpertPlacement:
        """Return the placement to begin with."""
        num_physical = self.topology(num_ranks).num_physical_experts
        return ExpertPlacement.trivial(self.model.num_layers, num_physical, self.model.num_logical_experts)
