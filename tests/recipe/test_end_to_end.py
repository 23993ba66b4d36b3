"""The published recipes and those of newer drafters, each run from its own file: cache, training, draft, decoding.

Depth of the target, its layers that are read, the draft's layers, precision, ZeRO configuration and micro-batch are the
recipe's; only widths, vocabulary, paths and the number of steps are small.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
from algorithm_tools import tiny_config
from cache_tools import WORDS, conversation_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepspec.cache.build import build_cache
from deepspec.data.conversations import write_conversations
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.quickstart.tokenizer import MASK_TOKEN_ID, VOCAB_SIZE, train_tokenizer
from deepspec.distributed import World
from deepspec.drafts import load_draft
from deepspec.export.consolidate import consolidate
from deepspec.recipe import Recipe, load_recipe
from deepspec.targets import load_target
from deepspec.training import run

pytest_plugins = ["training_fixtures"]

DEPTHS = {"qwen3_4b": 36, "qwen3_8b": 36, "qwen3_14b": 40, "gemma4_12b": 48, "qwen3_5_4b": 32}
PUBLISHED = [target for target in DEPTHS if target != "qwen3_5_4b"]
RECIPES = [f"{algorithm}_{target}" for target in PUBLISHED for algorithm in ("eagle3", "dflash", "dspark")]
RECIPES += [f"{drafter}_qwen3_8b" for drafter in ("eagle31", "p_eagle", "dflash2", "jetspec", "mtp")]
RECIPES += [f"{drafter}_qwen3_5_4b" for drafter in ("eagle3", "dflash", "dspark", "dflash2", "mtp")]
QUICK = "dspark_gemma4_12b"
LAUNCHED = [name for name in RECIPES if "gemma4" in name]  # by the deepspeed command, as a user does
IN_PROCESS = [name for name in RECIPES if "gemma4" not in name]


def target_of(name: str) -> str | None:
    """The target of a recipe among those of DEPTHS."""
    return next((target for target in DEPTHS if name.endswith(f"_{target}")), None)


def make_target(folder: Path, recipe: Recipe, depth: int) -> None:
    """A random target of the recipe's family and depth in its precision, with a tokenizer."""
    family = str(recipe.target.family)
    changes: dict[str, Any] = {"num_hidden_layers": depth, "vocab_size": VOCAB_SIZE}
    if family == "gemma4":
        pattern = ["sliding_attention"] * 5 + ["full_attention"]  # of the 12B
        changes |= {"layer_types": pattern * (depth // 6), "vocab_size_per_layer_input": VOCAB_SIZE}
    if family == "qwen3_5":  # its linear attention is slow here; tests/targets has it
        changes |= {"layer_types": ["full_attention"] * depth}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.to(getattr(torch, recipe.target.dtype)).save_pretrained(folder)
    train_tokenizer([" ".join(WORDS)] * 3).save_pretrained(folder)


def settings_of(name: str, folder: Path) -> list[str]:
    """What the command line sets: paths, two steps, and a mask token, since the published id lies beyond so few."""
    overrides = [
        f"target.path={folder / 'target'}", f"data.conversations={folder / 'c.jsonl'}", f"output={folder / 'run'}",
        f"data.cache=[{folder / 'cache'}]", "train.max_steps=2", "train.global_batch=2",
    ]  # fmt: skip
    return overrides if name.startswith(("eagle", "mtp")) else [*overrides, f"draft.mask_token_id={MASK_TOKEN_ID}"]


def prepare(folder: Path, name: str) -> tuple[Path, list[str]]:
    """Target, conversations and cache of a recipe in ``folder``; (its own file, what the command line sets)."""
    path, overrides = tools.ROOT / "recipes" / f"{name}.yaml", settings_of(name, folder)
    recipe = load_recipe(path, overrides)
    make_target(folder / "target", recipe, DEPTHS[target_of(name) or ""])
    write_conversations(folder / "c.jsonl", conversation_rows(16), {"made by": "a test"})
    build_cache(recipe, folder / "c.jsonl", folder / "cache")
    return path, overrides


def check(folder: Path, recipe: Recipe) -> None:
    """The run's log, the consolidated draft, and greedy decoding with it, which must be the target's own."""
    losses = [row["loss"] for row in tools.log_of(folder / "run") if row["step"] == 2]
    assert losses
    assert all(map(math.isfinite, losses))
    consolidate(folder / "run", folder / "draft")
    dtypes = {tensor.dtype for tensor in load_file(folder / "draft/model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    config = json.loads((folder / "draft/config.json").read_text())
    assert tuple(config["target_layer_ids"]) == recipe.target.layers
    assert config["num_hidden_layers"] == recipe.draft.num_layers
    target = load_target(recipe.target.path, torch.float32)  # bf16 rounds a pass of several tokens otherwise
    draft = load_draft(folder / "draft", target)
    assert draft.algorithm.name == recipe.algorithm
    settings = DecodeSettings(temperature=0.0, max_new_tokens=16)
    prompts = [[5, 6, 7, 8, 9], [11]]
    drafted = generate(target, draft.algorithm.drafter(draft, 2, 64), prompts, settings, 2)
    plain = generate(target, None, prompts, settings, 2)
    assert [one.output_ids for one in drafted] == [one.output_ids for one in plain]
    assert len(drafted[0].output_ids) == 16


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in IN_PROCESS)])
def test_runs_from_its_own_file(name: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tools.ROOT)
    path, overrides = prepare(tmp_path, name)
    trainer = run.assemble(run.prepare(load_recipe(path, overrides), world, False), world, profile=False)
    assert trainer.run(0)
    trainer.engine.close()
    check(tmp_path, load_recipe(path, overrides))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_runs_from_its_own_file_on_two_processes(name: str, tmp_path: Path) -> None:
    path, overrides = prepare(tmp_path, name)
    arguments = [word for text in overrides for word in ("--set", text)]
    done = tools.launch(tools.ROOT / "launch/train.py", ["--recipe", str(path), *arguments], processes=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check(tmp_path, load_recipe(path, overrides))


def test_every_published_recipe_is_among_them_and_keeps_its_settings() -> None:
    folder = tools.ROOT / "recipes"
    assert {path.stem for path in folder.glob("*.yaml") if target_of(path.stem)} == set(RECIPES)
    assert {QUICK, *IN_PROCESS, *LAUNCHED} == set(RECIPES)
    assert len(RECIPES) == 22
    changed = {override.split("=")[0] for name in RECIPES for override in settings_of(name, Path("x"))}
    assert changed == {
        *("target.path", "data.conversations", "data.cache", "output", "train.max_steps", "train.global_batch"),
        "draft.mask_token_id",
    }
