"""What a run loads of its target: embedding and head with the digest of the whole, unless the target must run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_tools as tools
from algorithm_tools import FAMILIES, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepspec.errors import TargetError
from deepspec.recipe import Recipe, ValidationSection, load_recipe
from deepspec.targets import Target, load_target, load_target_embeddings
from deepspec.targets.digests import weights_digest
from deepspec.training.run import frozen_target


def saved(folder: Path, family: str, tied: bool, shard: str = "1GB") -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=tied)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_those_of_the_whole_target(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    path = saved(tmp_path, family, tied)
    whole, ends = load_target(path, dtype), load_target_embeddings(path, dtype)
    assert not isinstance(ends, Target)
    assert ends.dtype == dtype
    assert torch.equal(ends.embed_weight, whole.embed_weight)
    assert torch.equal(ends.head_weight, whole.head_weight)
    assert (ends.embed_weight is ends.head_weight) == tied
    assert ends.spec == whole.spec


def test_the_ends_of_a_target_in_several_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "several", "qwen3", False, "20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert not isinstance(load_target_embeddings(path, torch.float32), Target)
    assert weights_digest(path) == weights_digest(saved(tmp_path / "one", "qwen3", False))


def test_another_value_gives_another_digest(tmp_path: Path) -> None:
    path = saved(tmp_path, "llama", True) / "model.safetensors"
    before = weights_digest(tmp_path)
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert weights_digest(tmp_path) != before


def test_a_target_stored_otherwise_is_loaded_whole(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "a", "qwen3", False))
    (tmp_path / "b").mkdir()
    model.config.save_pretrained(tmp_path / "b")
    torch.save(model.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    whole = load_target_embeddings(tmp_path / "b", torch.bfloat16)
    assert isinstance(whole, Target)
    assert weights_digest(tmp_path / "b") == weights_digest(tmp_path / "a")


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "qwen3", True) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    for load in (load_target, load_target_embeddings):
        with pytest.raises(TargetError, match=rf"{tmp_path}: cannot load the target"):
            load(tmp_path, torch.float32)


def test_only_a_run_that_feeds_the_target_loads_it_whole(tmp_path: Path) -> None:
    recipe = load_recipe(tools.write_recipe(tmp_path, tools.make_target(tmp_path / "target")))
    validation = ValidationSection(path="x", every=2)

    def with_validation(**changes: int) -> Recipe:
        return replace(recipe, train=replace(recipe.train, validation=replace(validation, **changes)))

    online = replace(recipe, data=replace(recipe.data, source="online", conversations="y"))
    wanted = [(recipe, False), (with_validation(), False), (with_validation(decode_every=4), True), (online, True)]
    for one, whole in wanted:
        assert isinstance(frozen_target(one, torch.device("cpu")), Target) == whole
