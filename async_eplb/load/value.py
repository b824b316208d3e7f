"""A load as a frozen value: tokens of each logical expert of each layer, over some steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from async_eplb.arguments import Whole, settle
from async_eplb.errors import InvalidLoad
from async_eplb.files.documents import LOAD_KEY
from async_eplb.files.loads import read_load, write_load
from async_eplb.files.tables import on_host

Tokens = npt.NDArray[np.int64] | npt.NDArray[np.float64]

PHASES = ("prefill", "decode")
"""Kinds of steps whose loads differ and are counted apart."""

_MOST_TOKENS = 2.0**53


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """Tokens that were routed to each logical expert of each layer.

    :param tokens: int64 or float64 ``[layers, logical]``, read-only
    :param num_steps: steps that they were counted over
    :param phase: kind of these steps; None for all kinds
    :raises InvalidLoad: if ``tokens`` is no such table, or has NaN, infinite or negative numbers, or any above 2**53,
        where float64 stops counting in ones
    """

    tokens: Tokens
    num_steps: int = 1
    phase: str | None = None

    def __post_init__(self) -> None:
        tokens = self.tokens
        if not isinstance(tokens, np.ndarray):
            raise InvalidLoad(f"{LOAD_KEY} is a {type(tokens).__name__}; from_counts takes all but arrays of numpy")
        if tokens.ndim != 2 or tokens.size == 0:  # noqa: PLR2004
            raise InvalidLoad(f"{LOAD_KEY} has shape {list(tokens.shape)}; it must be [layers, logical experts]")
        if tokens.dtype not in (np.int64, np.float64):
            raise InvalidLoad(f"{LOAD_KEY} holds {tokens.dtype}; tokens are int64 or float64")
        settle(self, InvalidLoad, num_steps=Whole(1))
        _require_countable(tokens)

    @classmethod
    def from_counts(cls, counts: object, *, num_steps: int | None = None, phase: str | None = None) -> "ExpertLoad":
        """Build a load from nested sequences, an array or a tensor.

        :param counts: ``[layers, logical]``, or ``[steps, layers, logical]``, which is summed over the steps
        :param num_steps: steps that the counts cover; without it, those of three dimensions in which anything was
            counted (recorders have room for more), and 1 otherwise
        :raises InvalidLoad: if ``counts`` is no such table of numbers, or holds numbers that no load has
        """
        try:
            table = on_host(counts)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InvalidLoad(f"{LOAD_KEY} is not a table: {error}") from error
        if not np.issubdtype(table.dtype, np.integer) and not np.issubdtype(table.dtype, np.floating):
            raise InvalidLoad(f"{LOAD_KEY} holds {table.dtype}; tokens are numbers")
        whole = np.issubdtype(table.dtype, np.integer)
        tokens: Tokens = np.array(table, dtype=np.int64) if whole else np.array(table, dtype=np.float64)
        steps = 1
        if tokens.ndim == 3:  # noqa: PLR2004
            _require_countable(tokens)  # of each step: sums of wrong numbers may look right
            steps = max(1, int(tokens.any(axis=(1, 2)).sum()))
            tokens = tokens.sum(axis=0)
        tokens.setflags(write=False)
        return cls(tokens, steps if num_steps is None else num_steps, phase)

    @classmethod
    def load(cls, source: str | Path) -> "ExpertLoad":
        """Read a load from a file of this package or of a serving engine. Nothing in a file is run.

        :param source: a ``.json``, ``.jsonl``, ``.npz``, ``.pt`` or ``.pth`` file, or an inline JSON object: what
            :meth:`save` writes; ``logical_count`` (SGLang); such a table alone (DeepSeek, vLLM); statistics of vLLM;
            SGLang's dump of single passes, or the folder of the dumps of all ranks
        :raises InvalidLoad: if it cannot be read, or holds something else
        """
        table = read_load(source)
        return cls.from_counts(table.counts, num_steps=table.num_steps, phase=table.phase)

    def save(self, path: str | Path) -> None:
        """Write the load to a ``.json`` or ``.npz`` file, from which :meth:`load` reads an equal one.

        :raises InvalidLoad: if the name of the file ends otherwise
        """
        write_load(Path(path), self.tokens, self.num_steps, self.phase)

    @property
    def num_layers(self) -> int:
        """Number of layers, the rows of the table."""
        return int(self.tokens.shape[0])

    @property
    def num_logical_experts(self) -> int:
        """Number of logical experts, the columns of the table."""
        return int(self.tokens.shape[1])

    def tokens_per_step(self) -> npt.NDArray[np.float64]:
        """Return the mean tokens of each expert in one step: float64 ``[layers, logical]``."""
        return self.tokens / float(self.num_steps)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertLoad):
            return NotImplemented
        alike = (self.num_steps, self.phase) == (other.num_steps, other.phase)
        return alike and np.array_equal(self.tokens, other.tokens)

    __hash__ = None  # type: ignore[assignment]


def _require_countable(tokens: Tokens) -> None:
    """Check that all numbers are counts.

    :param tokens: ``[..., layers, logical]``
    :raises InvalidLoad: if one is not
    """
    wrong = np.argwhere(~((tokens >= 0) & (tokens <= _MOST_TOKENS)))
    if len(wrong):
        layer, expert = (int(index) for index in wrong[0][-2:])
        raise InvalidLoad(
            f"layer {layer}: logical expert {expert} has {tokens[tuple(wrong[0])]} tokens; "
            "counts are finite, at least 0 and at most 2**53"
        )
