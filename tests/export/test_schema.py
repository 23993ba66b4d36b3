"""Exports at the real Qwen3-4B sizes on the meta device: names, shapes and the fields that engines read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.drafts import FROZEN
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.registry import engine

SCHEMAS = sorted((Path(__file__).parents[2].parent / "shared" / "golden" / "schema").glob("*.json"))
pytestmark = pytest.mark.skipif(not SCHEMAS, reason="no reference data in ../shared/golden")
MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
LAYERS = [1, 9, 17, 25, 33]


def released(path: Path) -> tuple[DraftCheckpoint, dict[str, list[int]]]:
    """A released draft by its schema: its config, and its tensors without values."""
    schema: dict[str, Any] = json.loads(path.read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in schema["tensors"].items()}
    return DraftCheckpoint(schema["config_json"], state), schema["tensors"]


def shapes(draft: DraftCheckpoint) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in draft.state.items()}


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_our_own_export_has_the_released_names_shapes_and_fields(path: Path) -> None:
    draft, tensors = released(path)
    written = engine("deepspec").write(draft)
    assert shapes(written) == tensors
    assert all(written.config[key] == value for key, value in draft.config.items())
    if draft.algorithm.name != "eagle3":
        assert written.config["sample_from_anchor"] is True


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["vllm", "speculators"])
def test_an_engines_export_has_the_released_tensors(name: str, path: Path) -> None:
    draft, tensors = released(path)
    written = engine(name).write(draft)
    expected = dict(tensors)
    if draft.algorithm.name == "dflash":  # served as DSpark with a head of rank 1 that adds nothing
        expected |= {key: [151936, 1] for key in MARKOV}
    assert shapes(written) == expected
    config = written.config
    higher = [layer + 1 for layer in LAYERS]
    if draft.algorithm.name == "eagle3":
        assert config["eagle_aux_hidden_state_layer_ids"] == higher
        assert config["norm_before_residual"] is False
        back = engine(name).read(written, ImportHints())
        assert shapes(back) == tensors
        assert back.parsed == draft.parsed
    elif name == "speculators":
        assert config["aux_hidden_state_layer_ids"] == higher
        assert config["sample_from_anchor"] is True
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    else:
        assert (config["target_layer_ids"], config["mask_token_id"], config["block_size"]) == (LAYERS, 151669, 7)


@pytest.mark.parametrize("path", [path for path in SCHEMAS if path.stem.startswith("dspark")], ids=lambda p: p.stem)
def test_sglang_takes_the_released_dspark_as_it_is(path: Path) -> None:
    draft, tensors = released(path)
    written = engine("sglang").write(draft)
    assert shapes(written) == tensors
    assert written.config["head_dim"] == 128
    assert {name: tensors[name] for name in FROZEN} == {key: [151936, 2560] for key in FROZEN}
