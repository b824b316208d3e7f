"""Tables of numbers, from whatever holds them."""

from typing import Any

import numpy as np
import numpy.typing as npt


def on_host(table: Any) -> npt.NDArray[np.generic]:  # noqa: ANN401 - whatever a caller has
    """Convert nested sequences, an array or a tensor of any device and dtype to an array.

    :raises ValueError: if they are not rectangular
    """
    if hasattr(table, "is_floating_point"):  # a tensor; numpy does not know bfloat16
        table = (table.double() if table.is_floating_point() else table).cpu()
    return np.asarray(table)


def numbers(table: Any, num_axes: int, what: str) -> npt.NDArray[Any]:  # noqa: ANN401 - as above
    """Do the same for numbers in so many axes.

    :raises ValueError: if the table holds anything else
    """
    array = on_host(table)
    if array.ndim != num_axes or not (np.issubdtype(array.dtype, np.number) and np.isrealobj(array)):
        raise ValueError(f"{what} is {array.dtype} of shape {list(array.shape)}; it must be numbers in {num_axes} axes")
    return array


def integers(table: Any, num_axes: int, what: str) -> npt.NDArray[np.int64]:  # noqa: ANN401 - as above
    """Do the same for integers.

    :raises ValueError: if the table holds anything else
    """
    array = numbers(table, num_axes, what)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} holds {array.dtype}; it must hold integers")
    return array.astype(np.int64)


def folded(counts: npt.NDArray[Any], physical_to_logical: npt.NDArray[np.int64], num_logical: int) -> npt.NDArray[Any]:
    """Fold counts of physical experts to logical ones: ``[steps, layers, logical]``.

    :param counts: ``[steps, layers, physical]``
    :param physical_to_logical: ``[layers, physical]``, -1 for empty slots, whose counts are left out
    :raises ValueError: if the map has another shape, or names an expert that no model of so many slots has
    """
    if counts.shape[1:] != physical_to_logical.shape:
        raise ValueError(f"counts are {list(counts.shape[1:])}, and their map is {list(physical_to_logical.shape)}")
    num_physical = physical_to_logical.shape[1]
    if physical_to_logical.size and not -1 <= physical_to_logical.min() <= physical_to_logical.max() < num_physical:
        raise ValueError(f"the map of the counts has numbers that are no logical experts of {num_physical} slots")
    layers = np.arange(len(physical_to_logical))
    logical = np.zeros((*counts.shape[:2], num_logical + 1), counts.dtype)  # the last column is for empty slots
    for physical in range(num_physical):
        logical[:, layers, physical_to_logical[:, physical]] += counts[:, :, physical]
    return logical[..., :-1]
