"""Tests of this folder run on a CUDA device; where there is none, they are not even collected."""

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what is left out."""
    if collect_ignore_glob:
        terminalreporter.write_line("tests/gpu was left out, for there is no CUDA device")


@pytest.fixture(autouse=True, scope="session")
def cuda() -> torch.device:
    """Return the device."""
    return torch.device("cuda", torch.cuda.current_device())
