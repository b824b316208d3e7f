"""Documents: what is read of any file, how its name may end, and what is said of one that holds something else."""

import builtins
import codecs
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_eplb import ExpertLoad, ExpertPlacement
from async_eplb.errors import EplbError, InvalidLoad, InvalidPlacement, MissingExtra

LOAD = {"logical_count": [[1, 2], [3, 4]]}
PLACEMENT = {"physical_to_logical_map": [[0, 1, 0], [1, 1, 0]]}
READERS: list[Callable[[Path], object]] = [ExpertLoad.load, ExpertPlacement.load]


@pytest.mark.parametrize("suffix", [".json", ".JSON", ".Json", ".jsonl", ".JSONL"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_of_any_name_and_encoding(tmp_path: Path, suffix: str, encoding: str) -> None:
    """Endings in any case; with a byte-order mark or without."""
    path = tmp_path / f"placement{suffix}"
    path.write_text(json.dumps(PLACEMENT), encoding=encoding)
    assert ExpertPlacement.load(path).physical_to_logical_map.tolist() == PLACEMENT["physical_to_logical_map"]


@pytest.mark.parametrize("before", ["\ufeff", " \n", "\ufeff "])
def test_inline_json_with_a_mark(before: str) -> None:
    """As an editor leaves it."""
    assert ExpertLoad.load(before + json.dumps(LOAD)) == ExpertLoad.from_counts(LOAD["logical_count"])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT", ".PTH"])
@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_of_any_name_and_format(tmp_path: Path, suffix: str, new_format: bool) -> None:  # noqa: FBT001
    """Both formats of torch."""
    path = tmp_path / f"load{suffix}"
    torch.save({"logical_count": torch.tensor([[1, 2]])}, path, _use_new_zipfile_serialization=new_format)
    assert ExpertLoad.load(path).tokens.tolist() == [[1, 2]]


def test_arrays_hold_either(tmp_path: Path) -> None:
    """NumPy's files, under the keys that other files have."""
    np.savez(tmp_path / "a.npz", **LOAD, **PLACEMENT)  # type: ignore[arg-type]
    assert ExpertLoad.load(tmp_path / "a.npz").tokens.tolist() == LOAD["logical_count"]
    assert ExpertPlacement.load(tmp_path / "a.npz").num_logical_experts == 2


class Surprise:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:.*TorchScript|.*torch.jit")
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", ["object", "object, old format", "array", "script", "truncated", "npz of objects"])
def test_nobody_is_advised_to_run_code(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    """A file with more than data in it is refused, nothing in it runs, and the error does not say how it could."""
    path, ran = tmp_path / "file.pt", tmp_path / "ran"
    surprise = {"logical_count": Surprise(ran), "physical_to_logical_map": Surprise(ran)}
    if kind == "array":
        torch.save({"logical_count": np.ones((1, 2))}, path)
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    elif kind == "truncated":
        torch.save({"logical_count": torch.ones(1, 2)}, path)
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "npz of objects":
        path = tmp_path / "file.npz"
        np.savez(path, **{key: np.array([value]) for key, value in surprise.items()})  # type: ignore[arg-type]
    else:
        torch.save(surprise, path, _use_new_zipfile_serialization=kind == "object")
    with pytest.raises(EplbError) as caught:
        read(path)
    said = "".join(traceback.format_exception(caught.value)).lower()
    assert not [advice for advice in ("weights_only", "safe_globals", "trust", "allow_pickle=true") if advice in said]
    assert not ran.exists()


@pytest.mark.parametrize(
    ("document", "hint"),
    [
        ({"physical_to_logical": [[0]]}, "its 'physical_to_logical' should be 'physical_to_logical_map'"),
        ({"Physical_To_Logical_Map": [[0]]}, "expected is"),
        ({"logical_count": [[1]]}, "'logical_count' is a load, from which a policy computes a placement"),
        ({"initial_global_assignment": {}}, "should be 'initial_global_assignments'"),
        ({"layers_list": []}, "should be 'layer_list'"),
        ({"layer_list": [{"devices_list": []}]}, "its 'devices_list' should be 'device_list'"),
        ({"layer_list": [{"device_list": [{"device_experts": []}]}]}, "its 'device_experts' should be 'device_expert'"),
        ({}, '"physical_to_logical_map": \\[layers, physical\\]'),
        ({1: 2, None: 3}, "expected is"),
    ],
)
def test_a_placement_under_another_key_is_hinted_at(tmp_path: Path, document: dict[Any, Any], hint: str) -> None:
    """The error names the file, the nearest key, and the forms that are read."""
    torch.save(document, tmp_path / "new.pt")
    with pytest.raises(InvalidPlacement, match=hint) as caught:
        ExpertPlacement.load(tmp_path / "new.pt")
    assert "new.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("document", "hint"),
    [
        ({"logical_counts": [[0]]}, "its 'logical_counts' should be 'logical_count'"),
        ({"logical_load": [[0]]}, "its 'logical_load' should be 'logical_count'"),
        ({"physical_to_logical_map": [[0]]}, "is a placement, which needs no load"),
        ({"record": []}, "should be 'records'"),
        ({"records": []}, "its .* should be 'last_physical_to_logical_map'|no 'last_physical_to_logical_map'"),
        ({"expert_load": [[1]], "p21_map": [[0]]}, "its 'p21_map' should be 'p2l_map'"),
        ({"tokens": [[[1]]], "num_steps": [1]}, "no 'axes'"),
    ],
)
def test_a_load_under_another_key_is_hinted_at(document: dict[str, Any], hint: str) -> None:
    """Also inside of a form."""
    with pytest.raises(InvalidLoad, match=hint):
        ExpertLoad.load(json.dumps(document))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["load.csv", "load", "load.json.gz", "a" * 5000 + ".json", "a\0b.json"])
def test_names_that_are_not_read(name: str, read: Callable[[Path], object]) -> None:
    """The error lists those that are, or says what is wrong with the file."""
    with pytest.raises(EplbError, match=r"\.json.*\.npz|cannot be read"):
        read(Path(name))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("source", [None, 3, b"{}", ["a.json"], codecs], ids=repr)
def test_a_source_that_is_no_name(source: Any, read: Callable[[Any], object]) -> None:
    """It is refused as any file that cannot be read."""
    with pytest.raises(EplbError):
        read(source)


def test_yaml_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyYAML is not installed."""
    imported = builtins.__import__

    def import_without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", import_without)
    (tmp_path / "a.yaml").write_text("initial_global_assignments: {0: [0, 1]}")
    with pytest.raises(MissingExtra, match=r"pip install 'async-eplb\[yaml\]'") as caught:
        ExpertPlacement.load(tmp_path / "a.yaml")
    assert caught.value.extra == "yaml"


DEVICES = [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad]


@pytest.mark.parametrize("mode", DEVICES)
@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_placements_do_not_depend_on_modes_of_torch(tmp_path: Path, suffix: str, mode: Callable[[], Any]) -> None:
    """A default device, as engines set one while they load a model, or inference mode."""
    placement = ExpertPlacement.from_mapping([[0, 1, 0]], 4)
    with mode():
        placement.save(tmp_path / f"inside{suffix}")
        assert ExpertPlacement.load(tmp_path / f"inside{suffix}") == placement
        assert ExpertPlacement.from_mapping(torch.tensor([[0, 1, 0]], device="cpu"), 4) == placement
    assert ExpertPlacement.load(tmp_path / f"inside{suffix}") == placement


@pytest.mark.parametrize("mode", DEVICES)
@pytest.mark.parametrize("new_format", [True, False])
def test_loads_do_not_depend_on_modes_of_torch(
    tmp_path: Path,
    new_format: bool,  # noqa: FBT001
    mode: Callable[[], Any],
) -> None:
    """Own files, and tensors."""
    load = ExpertLoad.from_counts([[1, 2]], num_steps=3)
    torch.save(torch.tensor([[1, 2]]), tmp_path / "load.pt", _use_new_zipfile_serialization=new_format)
    with mode():
        load.save(tmp_path / "load.npz")
        assert ExpertLoad.load(tmp_path / "load.npz") == load
        assert ExpertLoad.load(tmp_path / "load.pt").tokens.tolist() == [[1, 2]]


def test_a_global_default_device_does_not_matter(tmp_path: Path) -> None:
    """``torch.set_default_device``, which is another mechanism."""
    placement = ExpertPlacement.from_mapping([[0, 1, 0]])
    torch.set_default_device("meta")
    try:
        placement.save(tmp_path / "new.pt")
        assert ExpertPlacement.load(tmp_path / "new.pt") == placement
    finally:
        torch.set_default_device(None)
