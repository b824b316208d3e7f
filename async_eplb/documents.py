"""Documents that serving engines read and write: a ``.json`` file, a ``.pt`` file, or inline JSON."""

import json
from pathlib import Path

import torch

from async_eplb.errors import EplbError


def read_document(source: str | Path, what: str, error: type[EplbError]) -> object:
    """Read a document. Tensors are read without unpickling code.

    :param source: a file name, or an inline JSON object
    :param what: what the document should be, for the message
    :param error: raised if it cannot be read
    """
    try:
        if _is_inline(source):
            return json.loads(str(source))
        path = Path(source)
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".pt":
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as cause:
        raise error(f"{describe(source)} cannot be read: {cause}") from cause
    raise error(f"{source}: {what} is a .json file, a .pt file or an inline JSON object")


def describe(source: str | Path) -> str:
    """Return what to call a source in a message."""
    return "the inline JSON" if _is_inline(source) else str(source)


def _is_inline(source: str | Path) -> bool:
    return isinstance(source, str) and source.lstrip().startswith("{")
