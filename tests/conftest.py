"""What every test has: logging as a command starts it."""

from __future__ import annotations

import pytest

from deepspec.log import start_logging


@pytest.fixture(autouse=True)
def _logging() -> None:
    start_logging()
