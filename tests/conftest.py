"""What every test has: logging as a command starts it."""

from __future__ import annotations

import pytest

from deepspec.log import start_logging


@pytest.fixture(autouse=True)
def _logging() -> None:
    start_logging()


FIRST = ("training", "trust", "serving", "evaluate", "algorithms")  # minutes a file: none of them is left to the end


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first, as a process of pytest takes a file at a time."""
    root = config.rootpath / "tests"

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=rank)
