"""Live weights made up from JSON: tensors of any dtype, layout and kind, in rows and lists of any form."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from async_eplb.weights import ExpertWeights

_MOST_BYTES = 1 << 16
_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8", "bool", "complex64", "float64")


class _Plain(Tensor):
    """A subclass with memory of its own."""


class _Wrapper(Tensor):
    """A subclass whose elements are elsewhere."""

    def __new__(cls, inner: Tensor) -> "_Wrapper":  # noqa: PYI034 - as torch makes it
        make: Any = Tensor._make_wrapper_subclass  # noqa: SLF001 - torch has no other
        return make(cls, inner.shape, dtype=inner.dtype)  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError("it does nothing")


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


_KINDS: dict[str, Callable[[Tensor], object]] = {
    "plain": lambda tensor: tensor,
    "list": lambda tensor: [*tensor],
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
    "parameters": lambda tensor: nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in tensor]),
    "subclass": lambda tensor: tensor.as_subclass(_Plain),
    "inference": _inference,
    "wrapper": _Wrapper,
    "freed": _freed,
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor([*tensor]),
    "conjugated": lambda tensor: tensor.conj(),
    "array": lambda tensor: tensor.numpy(),
    "generator": lambda tensor: (part for part in tensor),
}
WORDS = tuple(f'"{word}"'.encode() for word in (*_KINDS, *_DTYPES, "kind", "dtype", "shape", "strides", "start"))


def feed(data: bytes) -> None:
    """Make weights; if they are taken, write each slot and look whether it stays as written.

    :raises ValueError: if the bytes describe no tensors
    """
    made: Any = _made(json.loads(data))
    weights = ExpertWeights({_key(row): given for row, given in made.items()} if isinstance(made, dict) else made)
    places = [(row, slot) for row in weights.rows for slot in range(weights.num_local_physical_experts)]
    for number, place in enumerate(places):
        for view in weights.slot_views(*place):
            view.fill_(number % 251)
    for number, place in enumerate(places):
        assert all((elements == number % 251).all() for elements in weights.slot_elements(*place))
        assert weights.addresses(place[0], [place[1]]).tolist() == [[v.data_ptr() for v in weights.slot_views(*place)]]
    weights.digest()
    weights.require_in_place()
    weights.require_alike(weights)


def seeds() -> list[bytes]:
    """Return weights of each kind, and of several layouts."""
    tensor = {"kind": "plain", "dtype": "float32", "shape": [2, 3, 4], "strides": [12, 4, 1], "start": 0}
    return [
        *(json.dumps({"0": [tensor | {"kind": kind}]}).encode() for kind in _KINDS),
        *(json.dumps({"0": [tensor | {"dtype": dtype}]}).encode() for dtype in _DTYPES),
        json.dumps({"0": [tensor, tensor | {"strides": [20, 1, 5], "start": 3}], "3": [[tensor, tensor]]}).encode(),
    ]


def _key(row: str) -> Any:
    return int(row) if row.isdecimal() else row


def _made(node: object) -> object:
    """Return what a value of JSON describes: tensors where it says so, and all else as it is."""
    if isinstance(node, list):
        return [_made(each) for each in node]
    if isinstance(node, dict) and "shape" in node:
        return _tensor(node)
    return {name: _made(each) for name, each in node.items()} if isinstance(node, dict) else node


def _tensor(described: dict[str, Any]) -> object:
    """Return a tensor in memory of its own.

    :raises ValueError: if there is none like that, or it is large
    """
    try:
        dtype: torch.dtype = getattr(torch, _DTYPES[_DTYPES.index(described["dtype"])])
        shape, strides = ([int(number) for number in described[name]] for name in ("shape", "strides"))
        start, kind = int(described["start"]), _KINDS[described["kind"]]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no tensor: {error!r}") from error
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    nbytes = dtype.itemsize * (start + reach)
    if min([*shape, *strides, start], default=0) < 0 or max([nbytes, *shape, *strides]) > _MOST_BYTES:
        raise ValueError("no tensor, or a large one")
    memory = torch.zeros(max(nbytes, 0), dtype=torch.uint8)
    tensor = memory.view(dtype).as_strided(shape, strides, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are prototypes of torch
        try:
            return kind(tensor)
        except (RuntimeError, NotImplementedError, TypeError) as error:  # torch has no such tensor
            raise ValueError(str(error)) from error
