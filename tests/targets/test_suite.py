"""Targets of all families pass the shipped suite, tied and untied, from a config and from a folder of several files."""

from __future__ import annotations

from pathlib import Path

import pytest
from algorithm_tools import FAMILIES, tiny_config, tiny_target
from transformers import PreTrainedConfig

from deepspec.testing.target import TargetModelSuite


class TestTiny(TargetModelSuite):
    @pytest.fixture(params=FAMILIES)
    def model(self, request: pytest.FixtureRequest) -> PreTrainedConfig:
        return tiny_config(request.param)


class TestTied(TargetModelSuite):
    @pytest.fixture(params=FAMILIES)
    def model(self, request: pytest.FixtureRequest) -> PreTrainedConfig:
        return tiny_config(request.param, tie_word_embeddings=True, eos_token_id=[2, 5])


class TestFolderOfSeveralFiles(TargetModelSuite):
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        tiny_target("qwen3").model.save_pretrained(tmp_path / "given", max_shard_size="20KB")
        assert len(list((tmp_path / "given").glob("*.safetensors"))) > 2
        return tmp_path / "given"
