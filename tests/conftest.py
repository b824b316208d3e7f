"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest
import torch
from blockbuster import blockbuster_ctx

torch.set_num_threads(1)  # tensors of tests are small; more threads would take the cores of other tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the GPU to one test at a time."""
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.alone)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each async test on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail a test that blocks its asyncio event loop."""
    with blockbuster_ctx():
        yield
