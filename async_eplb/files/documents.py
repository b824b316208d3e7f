"""Documents: files and inline JSON as plain values, and what is said about those that hold something else."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from async_eplb.errors import EplbError, MissingExtra

T = TypeVar("T")

MAP_KEY = "physical_to_logical_map"
LOAD_KEY = "logical_count"
ASSIGNMENTS_KEY = "initial_global_assignments"

VERSION = 1
"""Of the files that this package writes."""

_BYTE_ORDER_MARK = "\ufeff"
_MOST_KEYS = 64


@dataclass(frozen=True, slots=True)
class Forms(Generic[T]):
    """The forms in which documents hold one kind of value.

    :param by_key: key that tells a form → what reads a document that has it
    :param bare: what reads a document that is no mapping
    :param expected: the forms, for people
    :param others: keys of other kinds of documents → what such a document is
    :param error: raised if a document holds something else
    """

    by_key: Mapping[str, Callable[[Mapping[Any, Any]], T]]
    bare: Callable[[Any], T]
    expected: str
    others: Mapping[str, str]
    error: type[EplbError]

    def read(self, source: str | Path) -> T:
        """Read a value from a file, by the ending of its name, in whatever case, or from inline JSON."""
        return self.value_of(read_document(source, self.error), describe(source))

    def value_of(self, document: object, name: str) -> T:
        """Read a value from a document.

        :param name: of the document, for messages
        """
        with told_as(self.error, f"{name} cannot be read"):
            if not isinstance(document, Mapping):
                return self.bare(document)
            for key, read in self.by_key.items():
                if key in document:
                    return read(document)
        hints = "".join(f"; {key!r} is {what}" for key, what in self.others.items() if key in document)
        hints = _nearest(document, *self.by_key) + hints
        raise self.error(f"{name} holds no {next(iter(self.by_key))!r}{hints}; expected is {self.expected}")


def read_document(source: str | Path, error: type[EplbError]) -> object:
    """Read a file or inline JSON as plain values. Nothing in it is run.

    :param source: a file name, or an inline JSON object
    :param error: raised if it cannot be read
    """
    with told_as(error, f"{describe(source)} cannot be read"):
        if is_inline(source):
            return json.loads(str(source).lstrip(_BYTE_ORDER_MARK))
        path = Path(source)
        if (read := _READERS.get(ending(path))) is not None:
            return read(path)
    raise error(f"{source}: what is read are inline JSON objects, and files named {', '.join(_READERS)}")


def entry(document: object, key: str) -> Any:  # noqa: ANN401 - whatever a file holds there
    """Return what a mapping has under a key.

    :raises ValueError: if it is none, or has not; the message names the key that is nearest
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"a {type(document).__name__} is where an object with {key!r} must be")  # noqa: TRY004
    if key not in document:
        raise ValueError(f"there is no {key!r}{_nearest(document, key)}")
    return document[key]


def require_version(document: Mapping[Any, Any]) -> None:
    """Check the version of a file of this package; files of others have none.

    :raises ValueError: if it is later than this package
    """
    version = document.get("version", VERSION)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"it has version {version!r}, and this package reads versions up to {VERSION}")


def describe(source: str | Path) -> str:
    """Return the name of a source for messages."""
    return "the inline JSON" if is_inline(source) else str(source)


def ending(path: Path) -> str:
    """Return the ending of a file's name, in small letters."""
    return path.suffix.lower()


@contextmanager
def told_as(error: type[EplbError], message: str) -> Iterator[None]:
    """Raise whatever goes wrong in the body as an error of this package."""
    try:
        yield
    except EplbError:
        raise
    except Exception as cause:
        raise error(f"{message}: {cause}") from cause


def _nearest(document: Mapping[Any, Any], *keys: str) -> str:
    """Return a hint at the key of a document that is nearest to one that it should have, if one is near."""
    own = [key for key in list(document)[:_MOST_KEYS] if isinstance(key, str)]
    near = [(close[0], key) for key in keys if (close := get_close_matches(key, own, n=1))]
    return f"; perhaps its {near[0][0]!r} should be {near[0][1]!r}" if near else ""


def is_inline(source: str | Path) -> bool:
    """Return whether a source is a JSON object itself, and not the name of a file."""
    return isinstance(source, str) and source.lstrip(_BYTE_ORDER_MARK).lstrip().startswith("{")


def _read_json(path: Path) -> object:
    return json.loads(path.read_bytes())  # of bytes it finds out the encoding itself, with or without a mark


def _read_json_lines(path: Path) -> object:
    content = path.read_bytes()
    lines = content.decode(json.detect_encoding(content)).splitlines()
    documents = [json.loads(line) for line in lines if line.strip()]
    return documents[0] if len(documents) == 1 else documents


def _read_tensors(path: Path) -> object:
    import torch  # noqa: PLC0415 - slow to import, and planning needs no tensors

    with path.open("rb") as file:
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001 - torch's own message advises to load it without this protection
            raise ValueError(
                "it is damaged, or has more in it than tensors, numbers, strings, lists and dictionaries; other "
                "objects could run code and are not read"
            ) from None


def _read_arrays(path: Path) -> object:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {key: array if array.ndim else array.item() for key, array in arrays.items()}


def _read_yaml(path: Path) -> object:
    try:
        import yaml  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtra(f"{path} needs PyYAML; pip install 'async-eplb[yaml]'", extra="yaml") from error
    document = yaml.safe_load(path.read_bytes())
    if not isinstance(document, Mapping):
        raise ValueError("it holds no mapping")  # noqa: TRY004
    # Only this key is read of YAML, whose aliases let nested lists be larger than any memory.
    return {key: value if key == ASSIGNMENTS_KEY else None for key, value in document.items()}


_READERS: dict[str, Callable[[Path], object]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".pt": _read_tensors,
    ".pth": _read_tensors,
    ".npz": _read_arrays,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
"""Ending of a file's name → what reads it."""
