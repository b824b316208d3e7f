"""CONTRIBUTING.md and docs/design.md name files that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_are_named_exist(page: Path) -> None:
    """Paths between backticks, from the root of the tree, and links, from the page."""
    text = page.read_text()
    paths = {ROOT / path for path in re.findall(r"`((?:async_eplb|examples|scripts|tests|\.ci)/[\w./-]+)", text)}
    links = {page.parent / path for path in re.findall(r"\]\(([\w./-]+)\)", text)}
    assert paths
    assert [path for path in paths | links if not path.exists()] == []


def test_comments_cite_rules_that_there_are() -> None:
    """Those of correctness and of agreement, by number."""
    rules, agreement = (ROOT / "docs" / "design.md").read_text().split("## Agreement")
    numbers = {"": _numbers(rules), "agreement ": _numbers(agreement)}
    cited = {
        (kind.lower(), int(number))
        for path in (ROOT / "async_eplb").rglob("*.py")
        for kind, number in re.findall(r"\b(agreement )?rule (\d+)", path.read_text(), flags=re.IGNORECASE)
    }
    assert len(cited) > 10
    assert [rule for rule in cited if rule[1] not in numbers[rule[0]]] == []


def _numbers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"^(\d+)\. ", text, flags=re.MULTILINE)}
