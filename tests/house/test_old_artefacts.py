"""What the code of a06a0c0 wrote, today's code reads: a cache, a checkpoint of ZeRO-1, a draft folder, recipes.

``artefacts/`` was made in a checkout of that commit, under build/old: `tools/build_cache.py` over seven conversations,
two steps of `launch/train.py` with two processes, `tools/zero_to_fp32.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec import drafts
from deepspec.cache.reader import TargetCache
from deepspec.cache.verify import verify_cache
from deepspec.export.consolidate import consolidate
from deepspec.recipe import load_recipe


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artefacts where the recipe names them."""
    shutil.copytree(Path(__file__).with_name("artefacts"), tmp_path / "build" / "old")
    monkeypatch.chdir(tmp_path)
    return Path("build/old")


def test_a_cache_is_complete_and_gives_its_samples(old: Path) -> None:
    assert verify_cache(old / "cache") == []
    cache = TargetCache.open(old / "cache")
    assert (len(cache), int(cache.lengths.sum())) == (6, 665)
    sample = cache.sample(5)
    assert sample.features.shape == (len(sample.input_ids), 2 * 16)
    assert torch.isfinite(sample.features.float()).all()
    assert sample.loss_mask.any()


def test_a_checkpoint_is_consolidated_to_the_same_weights(old: Path) -> None:
    consolidate(old / "run", old / "again")
    found, wanted = (load_file(old / name / "model.safetensors") for name in ("again", "draft"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_draft_folder_is_loaded(old: Path) -> None:
    draft = drafts.load_draft(old / "draft")
    assert (draft.algorithm.name, draft.config.block_size, draft.config.markov_rank) == ("dspark", 4, 4)
    assert draft.shape.hidden_size == 16


@pytest.mark.parametrize("name", ["recipe.yaml", "run/recipe.yaml", "draft/recipe.yaml"])
def test_a_recipe_is_loaded(old: Path, name: str) -> None:
    recipe = load_recipe(old / name)
    assert (recipe.algorithm, recipe.train.max_steps, recipe.target.layers) == ("dspark", 2, (0, 2))
    assert recipe.train.deepspeed.endswith("deepspeed_configs/zero1_fp32.json")
