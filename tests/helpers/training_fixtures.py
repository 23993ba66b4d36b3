"""The process group of all training tests that run in pytest's own process: DeepSpeed cannot start a second one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepspec.distributed import World
from deepspec.training.engine import training_processes


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with training_processes() as world:
        yield world
