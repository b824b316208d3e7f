"""The examples for serving engines run as programs, between real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "engines"


@pytest.mark.parametrize(
    ("program", "num_slots"), [("sglang_updater.py", 144), ("vllm_expert_weights.py", 108)], ids=["sglang", "vllm"]
)
def test_an_engines_call_is_served(program: str, num_slots: int) -> None:
    """Every slot is right after each update, and another number of ranks is refused by name."""
    output = subprocess.run([sys.executable, EXAMPLES / program], check=True, capture_output=True, text=True).stdout
    assert f"{num_slots} slots compared over 3 updates, all right" in output
    assert "refused, RankMismatch: " in output
