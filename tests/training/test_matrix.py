"""Every algorithm for every family, in both precisions, at every ZeRO stage: train, save, consolidate, load, decode."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
from algorithm_tools import ALGORITHMS, FAMILIES, random_batch, tiny_config, tiny_draft, tiny_target
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.distributed import World
from deepspec.drafts import load_draft
from deepspec.export.consolidate import consolidate
from deepspec.recipe import load_recipe
from deepspec.targets import Target, load_target
from deepspec.training import run

pytest_plugins = ["training_fixtures"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATRIX = list(itertools.product(ALGORITHMS, FAMILIES, DTYPES, range(4)))
PROMPTS = [[5, 6, 7, 8], [9]]
LAYER_SCALAR = 0.5  # not the neutral 1 of a fresh model: a scalar that is lost shows


QUICK = {  # each algorithm with each family, each precision at each stage, Gemma4 (whose layers have a buffer) in bf16
    *(("eagle3", "gemma4", "bf16", 1), ("dflash", "gemma4", "bf16", 2), ("dspark", "gemma4", "bf16", 3)),
    *(("eagle3", "qwen3", "fp32", 3), ("dflash", "qwen3", "bf16", 0), ("dspark", "qwen3", "fp32", 0)),
    *(("eagle3", "llama", "fp32", 1), ("dflash", "llama", "fp32", 2), ("dspark", "llama", "bf16", 2)),
    ("p_eagle", "qwen3", "fp32", 3),  # a newer algorithm or family: one; the others are slow
    ("mtp", "qwen3_5", "fp32", 3),
    ("dflash2", "qwen3", "bf16", 3),
}
EVERY_FAMILY = ("eagle3", "dflash", "dspark")
EVERY_ALGORITHM = ("qwen3", "llama", "gemma4")


def combinations() -> list[Any]:
    return [
        pytest.param(*one, id="-".join(map(str, one)), marks=() if one in QUICK else pytest.mark.slow) for one in MATRIX
    ]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target of each family on disk."""
    folder = tmp_path_factory.mktemp("targets")
    for family in FAMILIES:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder / family)
    return folder


def trained(recipe: Path, world: World, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, torch.Tensor]:
    """Train the recipe to its end; the live weights."""
    tools.use_memory_source(monkeypatch)
    trainer = run.assemble(run.prepare(load_recipe(recipe, overrides), world, False), world, profile=False)
    for name, buffer in trainer.engine.model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(LAYER_SCALAR)
    assert trainer.run(0)
    with trainer.engine.complete_model() as model:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert model.rotary._inv_freq.dtype == torch.float32
    trainer.engine.close()
    return state


def decoded(target: Target, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy output ids with the draft, and without."""
    draft = load_draft(folder, target)
    assert draft.dtype == target.dtype
    settings = DecodeSettings(temperature=0.0, max_new_tokens=12)
    with_draft = generate(target, draft.algorithm.drafter(draft, 2, 64), PROMPTS, settings, 2)
    plain = generate(target, None, PROMPTS, settings, 2)
    return [one.output_ids for one in with_draft], [one.output_ids for one in plain]


@pytest.mark.parametrize(("algorithm", "family", "precision", "stage"), combinations())
def test_trains_saves_consolidates_loads_and_decodes(
    algorithm: str, family: str, precision: str, stage: int, targets: Path, world: World, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dtype = DTYPES[precision]
    recipe = tools.write_recipe(
        tmp_path / "r", targets / family, algorithm, f"zero{stage}_{precision}", max_steps=2, warmup_ratio=0.0
    )
    live = trained(recipe, world, monkeypatch)
    assert {tensor.dtype for tensor in live.values()} == {dtype}, "a buffer or weight of another precision"
    losses = [row["loss"] for row in tools.log_of(tmp_path / "r/run")]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    consolidate(tmp_path / "r/run", tmp_path / "draft")
    exported = load_file(tmp_path / "draft/model.safetensors")
    for name, tensor in live.items():
        assert torch.equal(exported[name], tensor), name
    target = load_target(targets / family, dtype)
    drafted, plain = decoded(target, tmp_path / "draft")
    assert [len(ids) for ids in drafted] == [12, 12]
    if precision == "fp32":  # in bf16 a pass of several tokens rounds otherwise than one of one
        assert drafted == plain


def test_the_quick_slice_meets_every_algorithm_family_precision_and_stage() -> None:
    assert set(MATRIX) >= QUICK
    assert {one[:2] for one in QUICK} >= set(itertools.product(EVERY_FAMILY, EVERY_ALGORITHM))
    assert {one[0] for one in QUICK} == set(ALGORITHMS)
    assert {one[1] for one in QUICK} == set(FAMILIES)
    assert {one[2:] for one in QUICK} == set(itertools.product(DTYPES, range(4)))
    assert {one[0] for one in QUICK if one[1:3] == ("gemma4", "bf16")} == set(EVERY_FAMILY)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{algorithm: (algorithm, {}) for algorithm in ALGORITHMS},
    "gated": ("dspark", {"markov_head": "gated"}),
    "rnn": ("dspark", {"markov_head": "rnn", "confidence_with_markov": False}),
    "reduced": ("dspark", {"draft_vocab_size": 20, "sample_from_anchor": False}),
    "reduced-eagle3": ("eagle3", {"draft_vocab_size": 20}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_of_a_bf16_draft_becomes_wider(variant: str, family: str) -> None:
    """One fp32 scalar in a forward makes every hidden state behind it fp32: half the speed, or an error."""
    target = tiny_target(family)
    target.model.to(torch.bfloat16)
    target = Target(target.model, target.spec)
    algorithm, changes = VARIANTS[variant]
    draft = tiny_draft(algorithm, tiny_target(family), **changes).to(torch.bfloat16)
    draft.attach(target.embed_weight, target.head_weight)
    seen: dict[str, torch.dtype] = {}
    for name, module in draft.named_modules():
        if "confidence" not in name and name != "candidate_selector":  # logits, which are fp32 as their losses are
            module.register_forward_hook(lambda _m, _i, out, name=name: _note(seen, name, out))
    for layer in draft.layers:
        layer.finish = _noting(seen, layer.finish)
    batch = random_batch([20, 12], len(draft.config.target_layers), dtype=torch.bfloat16)
    draft(batch).loss().backward()
    assert {parameter.grad.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    drafter = draft.eval().algorithm.drafter(draft, 2, 64)
    sampled: set[torch.dtype] = set()

    def sample(logits: torch.Tensor, _slot: int) -> tuple[torch.Tensor, None]:
        sampled.add(logits.dtype)
        return logits.argmax(dim=-1), None

    out = target.forward(torch.tensor([[3, 4, 5], [6, 7, 8]]), draft.config.target_layers)
    assert out.features.dtype == out.last_hidden.dtype == target.logits(out.last_hidden).dtype == torch.bfloat16
    drafter.extend(out.features, torch.tensor([[4, 5, 9], [7, 8, 9]]), torch.tensor([3, 3]), 3)
    drafter.propose(torch.tensor([9, 9]), sample)
    wide = {name for name, dtype in seen.items() if dtype != torch.bfloat16}
    assert not wide
    assert len(seen) > 10
    assert sampled == {torch.float32}, "softmaxes are taken in fp32"
    assert draft.frozen.embed(torch.tensor([3])).dtype == torch.bfloat16


def _note(seen: dict[str, torch.dtype], name: str, out: Any) -> None:
    if isinstance(out, torch.Tensor):
        seen[name] = out.dtype


def _noting(seen: dict[str, torch.dtype], finish: Any) -> Any:
    def run_and_note(residual: torch.Tensor, mixed: torch.Tensor, *gate: Any, **delta: Any) -> torch.Tensor:
        out: torch.Tensor = finish(residual, mixed, *gate, **delta)
        seen["attended heads"], seen["a layer's output"] = mixed.dtype, out.dtype
        return out

    return run_and_note


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_survive_a_change_of_the_number_of_processes(
    stage: int, targets: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma4's layer scalars, and the reduced vocabulary: without it a resumed draft would say other tokens."""
    zero, overrides = f"zero{stage}_bf16", ["draft.draft_vocab_size=20"]
    recipe = tools.write_recipe(tmp_path / "r", targets / "gemma4", "dflash", zero, max_steps=2, warmup_ratio=0.0)
    live = trained(recipe, world, monkeypatch, *overrides)
    prepared = run.prepare(load_recipe(recipe, overrides), world, False)
    elsewhere = dataclasses.replace(prepared, start=dataclasses.replace(prepared.start, universal=True))
    trainer = run.assemble(elsewhere, world, profile=False)
    with trainer.engine.complete_model() as model:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.engine.close()
    assert set(state) == set(live) >= {"d2t", "t2d", "layers.0.layer_scalar", "fc.weight"}
    for name, tensor in live.items():
        assert torch.equal(state[name], tensor), name
