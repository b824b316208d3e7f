"""Objectives: the cost of a replica to its rank, from its tokens a step; policies balance it over ranks.

An objective is elementwise, maps 0 to 0, and never falls as tokens rise.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from async_eplb.errors import InvalidOptions

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Objective = Callable[[FloatArray], FloatArray]
"""From tokens a step of each replica, of any shape, to the cost of each replica, of the same shape."""

_PROBES = np.array([[0.0, 1e-3, 1.0], [32.0, 1e4, 1e9]])


def tokens(tokens_per_step: FloatArray) -> FloatArray:
    """Return the cost of compute-bound steps: every token costs the same."""
    return tokens_per_step


def activated_experts(tokens_per_step: FloatArray) -> FloatArray:
    """Return the cost of memory-bound steps (decode): the probability that a step reads the replica's weights.

    Tokens choose experts independently, so that a replica's tokens in one step are Poisson distributed around
    their mean ``m``, and the weights are read with probability ``1 - exp(-m)``.
    """
    return np.asarray(-np.expm1(-tokens_per_step))


def require_objective(objective: Objective) -> None:
    """Check a custom objective at a few values.

    :raises InvalidOptions: if it changes the shape, does not map 0 to 0, falls, or is not finite
    """
    costs = np.asarray(objective(_PROBES.copy()))
    alike = costs.shape == _PROBES.shape and bool(np.isfinite(costs).all())
    if not alike or costs[0, 0] != 0 or (np.diff(costs.ravel()) < 0).any():
        raise InvalidOptions(
            f"objective is {objective!r}; it must be elementwise and finite, map 0 to 0, and never fall as tokens rise",
            option="objective",
        )
