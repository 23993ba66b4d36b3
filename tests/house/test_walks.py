"""The walks of docs/architecture.md: every file exists, and each list names it once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALKS = {
    title: re.findall(r"^\d+\. `([^`]+)`", body, flags=re.M)
    for title, body in re.findall(
        r"^### (.+?)$(.+?)(?=^##)", (ROOT / "docs" / "architecture.md").read_text(), flags=re.M | re.S
    )
}


def test_there_are_three_walks() -> None:
    assert len(WALKS) == 3
    assert all(len(files) > 5 for files in WALKS.values())


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_passes_every_file_once(title: str) -> None:
    files = WALKS[title]
    assert len(set(files)) == len(files)
    assert not [name for name in files if not (ROOT / name).is_file()]
