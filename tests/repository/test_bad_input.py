"""For any bytes from outside, files, options or ballots, the answer is a typed error or a valid value."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_eplb.agreement.ballot import Ballot, Status
from async_eplb.agreement.protocol import Agreement
from async_eplb.agreement.rules import Mode
from async_eplb.agreement.shared import SharedAgreement
from async_eplb.cli import main
from async_eplb.errors import BrokenControlGroup, EplbError, InvalidBallot
from async_eplb.fuzz import Scenario, scenario_for
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import EMPTY_SLOT, ExpertPlacement

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=12), children, max_size=3),
    max_leaves=12,
)
TABLES = st.lists(st.lists(st.integers(-3, 9) | st.integers(), max_size=5), max_size=4)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "physical_to_logical_map": TABLES | JSON,
        "logical_count": TABLES | JSON,
        "num_logical_experts": st.integers(-2, 20) | JSON,
    },
)
ROWS = st.lists(st.integers(-2, 70) | st.integers(-(2**63), 2**63 - 1), min_size=0, max_size=12)
BALLOTS = st.builds(
    Ballot,
    generation=st.integers(0, 3),
    digest=st.integers(0, 2),
    staged=st.integers(0, 5),
    launchable=st.integers(0, 5),
    finished=st.integers(0, 5),
    fence=st.integers(0, 9),
    status=st.sampled_from(Status),
    step=st.integers(0, 9),
    standing=st.integers(0, 1),
    demanded=st.integers(0, 3),
)


def require_valid(placement: ExpertPlacement) -> None:
    """A placement that was taken is one."""
    table = placement.physical_to_logical_map
    assert table.ndim == 2
    assert ((table >= EMPTY_SLOT) & (table < placement.num_logical_experts)).all()


@FEW
@given(DOCUMENTS)
def test_inline_documents(document: dict[str, Any]) -> None:
    """A placement or an error, a load or an error."""
    text = json.dumps(document)
    with contextlib.suppress(EplbError):
        require_valid(ExpertPlacement.load(text))
    with contextlib.suppress(EplbError):
        assert (ExpertLoad.load(text).tokens >= 0).all()


@FEW
@given(st.binary(max_size=200), st.sampled_from([".json", ".pt", ".txt", ""]))
def test_files_of_any_bytes(tmp_path: Path, content: bytes, ending: str) -> None:
    """They are refused."""
    path = tmp_path / f"placement{ending}"
    path.write_bytes(content)
    for read in (ExpertPlacement.load, ExpertLoad.load):
        with pytest.raises(EplbError):
            read(path)


@FEW
@given(st.data())
def test_files_with_other_bytes(tmp_path: Path, data: st.DataObject) -> None:
    """A saved placement of which some bytes are others is a placement or an error; nothing in it is run."""
    buffer = io.BytesIO()
    torch.save({"physical_to_logical_map": torch.arange(8).view(2, 4)}, buffer)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "placement.pt"
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    with contextlib.suppress(EplbError):
        require_valid(ExpertPlacement.load(path))


@FEW
@given(ROWS)
def test_rows_of_any_numbers(row: list[int]) -> None:
    """A row is a ballot, and then gives the same row, or is refused."""
    with contextlib.suppress(InvalidBallot):
        assert list(Ballot.from_row(row).to_row()) == row


@FEW
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_a_rank_that_talks_nonsense_is_lost(rows: list[list[int]]) -> None:
    """The control thread survives, and the update ends with an error that names the rank."""
    shared = SharedAgreement(Agreement())
    shared.begin(Mode.SERVING, digest=1, total=3, window=2, failed=False)
    goes_on = shared.receive([shared.ballot(), *rows])
    assert goes_on == (shared.faults.lost is None and not shared.faults.gone)
    if shared.faults.lost is not None:
        assert isinstance(shared.faults.lost, BrokenControlGroup)
        assert min(shared.faults.lost.missing) >= 1


@FEW
@given(st.sampled_from(Mode), st.lists(st.lists(BALLOTS, min_size=2, max_size=2), max_size=8))
def test_ballots_of_any_content(mode: Mode, rounds: list[list[Ballot]]) -> None:
    """For any ballots of others, nothing is agreed that is not staged here, and errors are typed."""
    agreement = Agreement()
    agreement.begin(mode, digest=1, total=4, window=2)
    agreement.update.staged = 3
    for others in rounds:
        try:
            verdict = agreement.receive([agreement.ballot(), *others])
        except EplbError:
            return
        assert verdict.agreed <= agreement.update.agreed <= agreement.update.staged


@FEW
@given(st.lists(st.text(alphabet="-=:,0123456789abcdefjknorstz{}\"'. ", max_size=12), max_size=5))
def test_any_command_line(arguments: list[str]) -> None:
    """Refused with a message and status 2, or help; never a traceback. Nothing is started."""
    with contextlib.suppress(SystemExit):
        assert main(["fuzz", "--seeds", "none", *arguments]) == 2


@FEW
@given(JSON)
def test_scenarios_of_any_text(value: Any) -> None:
    """Only what the fuzzer printed is run."""
    with pytest.raises(ValueError, match="scenario"):
        Scenario.from_json(json.dumps(value))


def test_a_scenario_comes_back() -> None:
    """The printed scenario is the one that was run."""
    for seed in range(50):
        assert Scenario.from_json(scenario_for(seed).to_json()) == scenario_for(seed)
