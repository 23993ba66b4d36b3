"""``train.init: {draft: ...}``: the draft as it was where it fits the recipe, honoured or refused by name where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import draft_section, random_batch, tiny_config
from export_tools import KINDS, LAYERS, made
from transformers import AutoModelForCausalLM

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.drafts import load_draft
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.parts import ImportHints
from deepspec.recipe import Recipe, recipe_from_dict
from deepspec.targets import load_target
from deepspec.training import from_draft


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny targets of the drafts, on disk; a folder for each family."""
    folder = tmp_path_factory.mktemp("targets")
    for family in ("qwen3", "llama"):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(family)).float().save_pretrained(folder / family)
    return folder


def recipe_for(
    target: Path, output: Path, kind: str, draft: Path, changes: dict[str, Any] | None = None, **init: Any
) -> Recipe:
    """A recipe for a draft of ``kind`` that starts from ``draft``; ``changes`` are keys of its `draft:`."""
    algorithm, section = KINDS[kind]
    section = draft_section(algorithm, **section, **(changes or {}))
    layers = section.pop("target_layers")
    if "target_layers" not in (changes or {}):
        layers = LAYERS
    values = {
        "name": "fine", "algorithm": algorithm, "draft": section, "output": str(output),
        "target": {"path": str(target), "layers": layers, "dtype": "float32"},
        "train": {"init": {"draft": str(draft), **init}},
    }  # fmt: skip
    return recipe_from_dict(values)


def started(recipe: Recipe, target: Any) -> DraftModel:
    """The recipe's draft before its first step."""
    from_draft.keep_draft(recipe)
    recipe = recipe.for_target(target.spec)
    draft = from_draft.kept_draft(recipe)
    model = registry.algorithm(recipe.algorithm).build(recipe.draft, target.spec, recipe.seed)
    model.attach(target.embed_weight, target.head_weight)
    if recipe.draft.draft_vocab_size is not None:
        tokens = from_draft.kept_vocabulary(draft, recipe)
        model.set_draft_vocab(torch.arange(recipe.draft.draft_vocab_size) if tokens is None else tokens)
    from_draft.start_from(model, draft, recipe.train.init)
    return model


@torch.no_grad()
def loss(model: DraftModel) -> float:
    terms = model(random_batch([25, 14]))
    return float(terms.weighted_sum())


STARTS = [
    ("deepspec", "eagle3", "qwen3"), ("deepspec", "eagle3-reduced", "qwen3"), ("deepspec", "dflash", "llama"),
    ("deepspec", "dspark-gated", "qwen3"), ("deepspec", "dspark-reduced", "qwen3"),
    ("vllm", "eagle3", "qwen3"), ("vllm", "dflash", "qwen3"), ("vllm", "dspark", "qwen3"),
    ("sglang", "eagle3-reduced", "llama"), ("sglang", "dflash", "qwen3"), ("sglang", "dspark", "qwen3"),
    ("speculators", "eagle3", "qwen3"), ("speculators", "dflash-k-1", "qwen3"), ("speculators", "dspark", "qwen3"),
    ("zlab", "dflash-k-1", "qwen3"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "kind", "family"), STARTS)
def test_the_first_loss_is_the_imported_drafts(
    form: str, kind: str, family: str, targets: Path, tmp_path: Path
) -> None:
    target = load_target(targets / family, torch.float32)
    _, _, ours = made(tmp_path, kind, family)
    export_draft(ours, tmp_path / "out", ExportOptions(form))
    recipe = recipe_for(targets / family, tmp_path / "run", kind, tmp_path / "out")
    model = started(recipe, target)
    import_draft(tmp_path / "out", tmp_path / "back", "auto", ImportHints(target.spec, max_draft=3))
    back = load_draft(tmp_path / "back", target)
    back.config = model.config
    assert loss(model) == pytest.approx(loss(back), rel=1e-6)
    fresh = registry.algorithm(recipe.algorithm).build(model.config, target.spec, recipe.seed)
    fresh.attach(target.embed_weight, target.head_weight)
    assert loss(fresh) != pytest.approx(loss(back), rel=1e-3)
