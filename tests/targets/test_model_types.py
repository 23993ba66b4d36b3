"""Model types of transformers as targets: the shipped suite on tiny random models of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from model_types import IMAGE_TEXT, TYPES, config_of
from transformers import PreTrainedConfig

from deepspec.testing.target import TargetDraftSuite, TargetModelSuite

EVERY = sorted({*TYPES, *IMAGE_TEXT})


def types(quick: Sequence[str]) -> list[Any]:
    """Every model type as a parameter; all but some are slow."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in EVERY]


class TestModelType(TargetModelSuite):
    test_the_digest_changes_with_a_tensors_bytes = None  # of files, whatever the model; test_suite.py has it

    @pytest.fixture(params=types(["gpt_oss", "qwen3_next", "gemma3"]))
    def model(self, request: pytest.FixtureRequest) -> PreTrainedConfig:
        return config_of(request.param)


class TestDraftsOfModelType(TargetDraftSuite):
    algorithms = ("dspark", "eagle3")

    @pytest.fixture(params=types(["gpt_oss"]))
    def model(self, request: pytest.FixtureRequest) -> PreTrainedConfig:
        return config_of(request.param)
