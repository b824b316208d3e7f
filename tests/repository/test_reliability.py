"""RELIABILITY.md names tests that there are."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "RELIABILITY.md"
ROWS = [
    (file, words)
    for line in PAGE.read_text().splitlines()
    for file, words in re.findall(r"`(test_\w+)`(?:: `([^`]+)`)?", line)
]


class _Ids:
    """Remembers what pytest collects."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.ids += [item.nodeid.partition("::")[2] for item in items]


@pytest.mark.parametrize(("file", "words"), sorted(set(ROWS)))
def test_a_named_test_is_there(file: str, words: str) -> None:
    """Its file, and in it a test whose id holds all words, where "…" stands for any."""
    (path,) = TESTS.rglob(f"{file}.py")
    if words:
        collected = _Ids()
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(path)], plugins=[collected])
        pattern = ".*".join(map(re.escape, re.split(r" ?… ?|…", words)))
        assert [name for name in collected.ids if re.search(pattern, name)]


def test_the_page_names_tests() -> None:
    """This test would see none otherwise."""
    assert len(ROWS) > 20
    assert sum(bool(words) for _, words in ROWS) >= 8
