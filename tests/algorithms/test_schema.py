"""Names, shapes and config fields of the released checkpoints, at the real Qwen3-4B sizes on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepspec.drafts import FROZEN, draft_algorithm
from deepspec.targets.load import TargetSpec, family_of

SCHEMAS = sorted((Path(__file__).parents[2].parent / "shared" / "golden" / "schema").glob("*.json"))


@pytest.mark.skipif(not SCHEMAS, reason="no reference data in ../shared/golden")
@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_released_checkpoint_has_our_names_shapes_and_fields(path: Path) -> None:
    schema = json.loads(path.read_text())
    published = schema["config_json"]
    algorithm = draft_algorithm(published)
    family = family_of(published["model_type"])
    config = algorithm.read_config(published)
    with torch.device("meta"):
        model = algorithm.build_model(config, family.read_shape(published), family)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    frozen = [published["vocab_size"], published["hidden_size"]]
    assert shapes | dict.fromkeys(FROZEN, frozen) == schema["tensors"]
    assert sum(p.numel() for p in model.parameters()) == schema["trainable_params"]
    target_config = {**published, "num_hidden_layers": published["num_target_layers"]}
    target = TargetSpec("Qwen/Qwen3-4B", family, target_config, published["model_type"])
    written = algorithm.config_json(config, target, "bfloat16")
    missing = {key for key in published if key not in written}
    different = {key for key in published if key in written and written[key] != published[key]}
    assert (missing, different) == (set(), set())
