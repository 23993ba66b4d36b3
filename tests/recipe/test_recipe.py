"""Recipes: strict reading, overrides, inheritance, and the twelve published ones value by value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from deepspec import registry
from deepspec.errors import RecipeError
from deepspec.recipe import load_recipe, recipe_from_dict
from deepspec.sections import parse_section
from deepspec.targets import TargetSpec

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED_TARGETS = {  # layers read, mask token
    "qwen3_4b": ("Qwen/Qwen3-4B", "qwen3", (1, 9, 17, 25, 33), 151669),
    "qwen3_8b": ("Qwen/Qwen3-8B", "qwen3", (1, 9, 17, 25, 33), 151669),
    "qwen3_14b": ("Qwen/Qwen3-14B", "qwen3", (1, 10, 19, 28, 37), 151669),
    "gemma4_12b": ("google/gemma-4-12B-it", "gemma4", (5, 17, 29, 41, 46), 4),
}
ALGORITHMS = ("eagle3", "dflash", "dspark")


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


SMALL = """
name: small
algorithm: dspark
target: {path: nowhere/at-all, layers: [1, 3]}
draft: {num_layers: 1, block_size: 4, num_anchors: 8, mask_token_id: 3, markov_rank: 8}
train: {global_batch: 8, micro_batch: 2}
"""


@pytest.mark.parametrize("target", PUBLISHED_TARGETS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_published_recipe_has_the_published_values(algorithm: str, target: str) -> None:
    recipe = load_recipe(RECIPES / f"{algorithm}_{target}.yaml")
    path, family, layers, mask = PUBLISHED_TARGETS[target]
    assert recipe.name == f"{algorithm}_{target}"
    assert recipe.output == f"runs/{recipe.name}"
    assert (recipe.target.path, recipe.target.family, recipe.target.layers) == (path, family, layers)
    train = recipe.train
    assert (train.epochs, train.micro_batch, train.global_batch) == (10, 1, 512)
    assert (train.lr, train.weight_decay, train.warmup_ratio, train.grad_clip) == (6e-4, 0.0, 0.04, 1.0)
    assert (train.save_every, train.log_every) == (3000, 10)
    assert train.deepspeed == "deepspeed_configs/zero1_bf16.json"
    assert (recipe.data.max_length, recipe.data.min_supervised, recipe.data.held_out) == (4096, 14, 0.05)
    assert recipe.data.prompts == "mlabonne/open-perfectblend"
    assert recipe.data.thinking is False
    assert (recipe.evaluate.temperature, recipe.evaluate.max_new_tokens, recipe.evaluate.seed) == ((1.0,), 2048, 980406)
    assert recipe.seed == (0 if algorithm == "eagle3" else 42)
    draft = recipe.draft
    if algorithm == "eagle3":
        assert (draft.num_layers, draft.ttt_length, draft.step_loss_decay) == (1, 7, 0.8)
    else:
        assert (draft.num_layers, draft.block_size, draft.num_anchors) == (5, 7, 512)
        assert (draft.mask_token_id, draft.loss_decay_gamma) == (mask, 4.0)
    if algorithm == "dspark":
        assert (draft.markov_rank, draft.markov_head) == (256, "vanilla")
        assert (draft.ce_weight, draft.l1_weight, draft.confidence_weight) == (0.1, 0.9, 1.0)
        assert draft.confidence_head
        assert draft.confidence_with_markov
    assert recipe.draft.target_layers == layers
    assert recipe.draft.algorithm == algorithm
    assert recipe.draft.max_draft == 7


def test_qwen_answers_are_drawn_with_the_published_sampling() -> None:
    made = load_recipe(RECIPES / "dspark_qwen3_4b.yaml").regenerate
    assert (made.temperature, made.top_p, made.top_k, made.min_p, made.max_tokens) == (0.7, 0.8, 20, 0.0, 4096)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_file_loads_and_survives_saving(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert (RECIPES.parent / load_recipe(path).train.deepspeed).is_file()
    monkeypatch.chdir(tmp_path)  # all its paths are absolute from here, as they are in a recipe saved here
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    recipe.save(tmp_path / "again.yaml")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_the_folder_holds_the_twelve_and_the_quickstart() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    wanted = {f"{a}_{t}" for a in ALGORITHMS for t in PUBLISHED_TARGETS} | {f"quickstart_{a}" for a in ALGORITHMS}
    wanted |= {f"{a}_smollm2_135m" for a in ALGORITHMS}
    assert wanted <= names


def test_overrides_win_and_take_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    texts = ["train.lr=3e-4", "data.cache=[a, b]", "train.max_steps=7", "target.revision=main", "train.max_steps=null"]
    recipe = load_recipe(path, texts)
    assert recipe.train.lr == 3e-4
    assert recipe.data.cache == ("a", "b")
    assert recipe.target.revision == "main"
    assert recipe.train.max_steps is None
    assert recipe.digest() != load_recipe(path).digest()


def test_extends_merges_in_order_and_refuses_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "train: {lr: 1.0e-3, epochs: 3}\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\ntrain: {lr: 2.0e-3}\n", "b.yaml")
    recipe = load_recipe(write(tmp_path, f"extends: [b.yaml]\n{SMALL}"))
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.global_batch) == (2e-3, 3, 8)
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml: extends: extends itself|b\.yaml: extends: extends itself"):
        load_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["train.lrr", "unknown key", "did you mean 'lr'"]),
        ("train.lr=fast", ["train.lr", "'fast'", "float"]),
        ("train.lr=.nan", ["train.lr", "float"]),
        ("train.epochs=2.5", ["train.epochs", "2.5", "int"]),
        ("train.epochs=true", ["train.epochs", "True", "int"]),
        ("train.tensorboard=1", ["train.tensorboard", "bool"]),
        ("train.lr=-1", ["train.lr", "-1", "above 0"]),
        ("train.global_batch=9", ["train.global_batch", "9", "multiple of train.micro_batch (2)"]),
        ("train.betas=[0.9]", ["train.betas", "two"]),
        ("train.keep_best=true", ["train.keep_best", "train.validation"]),
        (
            "train.validation={path: x, every: 10, decode_every: 15}",
            ["train.validation.decode_every", "15", "multiple"],
        ),
        ("train.validation={path: x, sets: {a: y}}", ["train.validation.sets", "two places named"]),
        ("train.validation={sets: {a b: y}}", ["train.validation.sets", "'a b'"]),
        ("train.validation={sets: {a: 7}}", ["train.validation.sets.a", "7", "str"]),
        ("train.validation={sets: {a: y}, weights: {b: 2}}", ["train.validation.weights", "'b'", "one of the sets: a"]),
        ("train.validation={sets: {a: y}, weights: {a: 0}}", ["train.validation.weights.a", "above 0"]),
        ("train.validation={path: x, patience: 2}", ["train.keep_best", "patience needs"]),
        ("train.warmup_ratio=1.5", ["train.warmup_ratio", "1.5"]),
        ("target.layers=[]", ["target.layers", "at least one"]),
        ("target.layers=[3, 3]", ["target.layers", "twice"]),
        ("target.layers=[-2, 1]", ["target.layers", "-1"]),
        ("target.family=qwen4", ["target.family", "did you mean 'qwen3'"]),
        ("target.dtype=float16", ["target.dtype", "float16", "'bfloat16'"]),
        ("target=7", ["target", "a mapping"]),
        ("algorithm=dspork", ["algorithm", "did you mean 'dspark'"]),
        ("data.source=onlin", ["data.source", "did you mean 'online'"]),
        ("data.cache_weights=[1.0]", ["data.cache_weights", "0 weights"]),
        ("data.conversation_weights=[1.0]", ["data.conversation_weights", "0 weights"]),
        ("nonsense=1", ["nonsense", "unknown key"]),
        ("draft.target_layers=[1]", ["draft.target_layers", "target.layers"]),
        ("draft.block_sise=7", ["draft.block_sise", "did you mean 'block_size'"]),
        ("evaluate.temperature=[]", ["evaluate.temperature"]),
        ("train", ["not an override"]),
    ],
)
def test_a_bad_value_is_named_with_file_key_value_and_remedy(tmp_path: Path, override: str, words: list[str]) -> None:
    path = write(tmp_path, SMALL)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ["not a YAML file"]),
        ("- 1\n", ["not a recipe"]),
        (SMALL + "name: twice\n", ["name", "key given twice"]),
        (SMALL + "extends: gone.yaml\n", ["gone.yaml", "no such recipe file"]),
        (SMALL.replace("name: small\n", ""), ["name", "missing key"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_is_checked_against_its_target(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["target.family=qwen3"])
    spec = SimpleNamespace(num_layers=2, family=SimpleNamespace(name="qwen3"))
    with pytest.raises(RecipeError, match=r"target\.layers: layer beyond the model.*layers below 2"):
        recipe.for_target(spec)
    other = SimpleNamespace(num_layers=8, family=SimpleNamespace(name="llama"))
    with pytest.raises(RecipeError, match=r"target\.family: family of another target"):
        recipe.for_target(other)


def test_to_dict_is_plain_yaml() -> None:
    recipe = load_recipe(RECIPES / "dspark_qwen3_4b.yaml")
    values = yaml.safe_load(recipe.to_yaml())
    assert values == recipe.to_dict()
    assert recipe_from_dict(values) == recipe


def test_sections_read_nested_optional_and_typed_lists() -> None:
    @dataclass(frozen=True)
    class Inner:
        number: int
        share: float = 0.5

    globals()["Inner"] = Inner

    @dataclass(frozen=True)
    class Outer:
        inner: Inner | None = None
        names: tuple[str, ...] = ()
        either: int | str = 0

    assert parse_section(Outer, None, "o") == Outer()
    read = parse_section(Outer, {"inner": {"number": 1, "share": 2}, "names": ["a"], "either": "x"}, "o")
    assert read == Outer(Inner(1, 2.0), ("a",), "x")
    with pytest.raises(RecipeError, match=r"o\.inner\.number: missing key; wanted int"):
        parse_section(Outer, {"inner": {}}, "o")
    with pytest.raises(RecipeError, match=r"o\.names\[1\]"):
        parse_section(Outer, {"names": ["a", 1]}, "o")
    with pytest.raises(RecipeError, match=r"o\.either.*int or str"):
        parse_section(Outer, {"either": [1]}, "o")


def test_recipes_of_newer_block_drafters_have_the_published_values() -> None:
    second, causal = (load_recipe(RECIPES / f"{name}_qwen3_8b.yaml") for name in ("dflash2", "jetspec"))
    draft = second.draft
    assert (draft.block_size, draft.loss_decay_gamma, draft.num_anchors, draft.sample_from_anchor) == (
        16,
        7.0,
        256,
        False,
    )
    assert (draft.conv_kernel_size, draft.conv_group_size, draft.selector_rank, draft.selector_top_k) == (
        2,
        16,
        256,
        16,
    )
    assert (draft.selector_weight, second.train.lr, second.train.betas) == (1.0, 6e-4, (0.9, 0.95))
    assert (causal.algorithm, causal.draft.causal, causal.draft.loss_decay_gamma) == ("dflash", True, None)
    assert [(term.name, term.weight) for term in causal.draft.loss] == [("kl", 1.0)]


@pytest.mark.parametrize("name", ["eagle3", "dflash", "dspark", "dflash2", "mtp"])
def test_recipes_of_qwen3_5_fit_their_target(name: str) -> None:
    """At the target's real sizes, on the meta device; those that the config class does not default to are the 4B's."""
    from transformers.models.qwen3_5 import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(hidden_size=2560, intermediate_size=9216).to_dict()
    spec = TargetSpec("Qwen/Qwen3.5-4B", registry.family("qwen3_5"), config, "qwen3_5_text")
    recipe = load_recipe(RECIPES / f"{name}_qwen3_5_4b.yaml")
    algorithm = registry.algorithm(recipe.algorithm)
    algorithm.check_target(recipe.draft, spec)
    with torch.device("meta"):
        model = algorithm.build(recipe.draft, spec)
    count = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert count["fc.weight"] == (2 if name == "mtp" else 5) * 2560 * 2560
    wide = 2 if name in ("mtp", "eagle3") else 1  # a gate of its own head; embeddings beside features
    assert count["layers.0.self_attn.q_proj.weight"] == wide * 16 * 256 * 2560
    assert recipe.draft.target_layers[-1] <= spec.num_layers == 32
