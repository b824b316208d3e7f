"""Requests, the sequences that answer them, and the batch that a forward pass works on."""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to be continued.

    :param number: names the request on all ranks
    :param prompt: tokens, at least one
    :param max_tokens: tokens to generate, at least one
    :param not_before: forward pass that it may be admitted at; for runs that must be the same each time
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    not_before: int = 0

    def refusal(self, config: ModelConfig, max_pass_tokens: int) -> str:
        """Return why an engine cannot serve this request, or an empty string."""
        if not self.prompt or self.max_tokens < 1:
            return "a request needs a prompt and at least one token to generate"
        if not all(0 <= token < config.vocabulary for token in self.prompt):
            return f"tokens are numbers from 0 to {config.vocabulary - 1}"
        if len(self.prompt) > max_pass_tokens:
            return f"a prompt has at most {max_pass_tokens} tokens; this one has {len(self.prompt)}"
        if len(self.prompt) + self.max_tokens > config.max_context:
            return f"a prompt and its answer have at most {config.max_context} tokens together"
        return ""


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A request being answered, with its keys and values.

    :param cache: ``[layers, 2, heads, max_context, hidden / heads]``
    :param num_cached: tokens whose keys and values are in the cache
    """

    request: Request
    cache: Tensor
    generated: list[int] = field(default_factory=list)
    num_cached: int = 0

    @classmethod
    def of(cls, request: Request, config: ModelConfig, device: torch.device | str = "cpu") -> "RunningSequence":
        """Begin to answer a request."""
        width = config.hidden // config.num_heads
        shape = (config.num_layers, 2, config.num_heads, config.max_context, width)
        return cls(request, torch.zeros(shape, device=device))

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Tokens of the next pass: the whole prompt first, then the last token generated."""
        return self.request.prompt if not self.generated else (self.generated[-1],)

    @property
    def finished(self) -> bool:
        """Whether all tokens asked for are there."""
        return len(self.generated) >= self.request.max_tokens


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a batch that belong to one sequence."""

    sequence: RunningSequence
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank computes in a pass; no rows in a dummy pass.

    :param tokens: int64 ``[rows]``: rows of sequences that decode first, then whole prompts
    :param spans: rows of each sequence
    :param num_decode_rows: rows of sequences that decode
    """

    tokens: Tensor
    spans: tuple[Span, ...]
    num_decode_rows: int

    @classmethod
    def of(cls, sequences: Sequence_[RunningSequence], device: torch.device | str = "cpu") -> "Batch":
        """Lay out the rows of a pass."""
        ordered = sorted(sequences, key=lambda sequence: not sequence.generated)
        tokens: list[int] = []
        spans = []
        for sequence in ordered:
            start = len(tokens)
            tokens.extend(sequence.new_tokens)
            spans.append(Span(sequence, start, len(tokens)))
        num_decode_rows = sum(1 for sequence in ordered if sequence.generated)
        return cls(torch.tensor(tokens, dtype=torch.int64, device=device), tuple(spans), num_decode_rows)

    @property
    def phases(self) -> tuple[str, ...]:
        """Kinds of rows that there are, as :class:`async_eplb.LoadWindow` names them."""
        num_prefill_rows = len(self.tokens) - self.num_decode_rows
        return tuple(phase for phase, rows in (("decode", self.num_decode_rows), ("prefill", num_prefill_rows)) if rows)

    @property
    def last_rows(self) -> list[int]:
        """The row of each sequence whose logits choose its next token."""
        return [span.end - 1 for span in self.spans]
