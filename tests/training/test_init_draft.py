"""``train.init: {draft: ...}``: the draft as it was where it fits the recipe, honoured or refused by name where not."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import draft_section, random_batch, tiny_config
from export_tools import KINDS, LAYERS, made
from transformers import AutoModelForCausalLM

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.drafts import load_draft, read_weights, save_draft
from deepspec.errors import CheckpointError, DraftError, RecipeError
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.parts import ImportHints
from deepspec.recipe import Recipe, recipe_from_dict
from deepspec.targets import load_target
from deepspec.training import from_draft
from deepspec.training.initial import frozen_weights


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
    section = draft_section(algorithm, **{"target_layers": LAYERS, **section, **(changes or {})})
    layers = section.pop("target_layers")
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
    model.attach(*from_draft.frozen_pair(recipe, target), target.head_weight)
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


@torch.no_grad()
def proposed(model: DraftModel) -> list[list[int]]:
    """Greedy proposals of two rows."""
    drafter, batch = model.eval().algorithm.drafter(model, 2, 64), random_batch([20, 20])
    drafter.extend(batch.features, batch.input_ids, torch.tensor([12, 9]), 20)
    return drafter.propose(torch.tensor([5, 7]), lambda logits, _: (logits.argmax(-1), None)).tokens.tolist()


def test_new_heads_start_at_zero_effect(targets: Path, tmp_path: Path) -> None:
    target = load_target(targets / "qwen3", torch.float32)
    _, plain, ours = made(tmp_path, "dflash")
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", "dspark", ours), target)
    assert proposed(model) == proposed(plain)
    assert model.markov_head.markov_w1.weight.any()  # else its gradient, and that of W2, would stay zero


def test_new_convolutions_and_a_new_selector_start_at_zero_effect(targets: Path, tmp_path: Path) -> None:
    target = load_target(targets / "qwen3", torch.float32)
    _, plain, ours = made(tmp_path, "dflash-k-1")
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", "dflash2", ours), target)
    assert proposed(model) == proposed(plain)
    assert model.candidate_selector.predecessor_codebook.any()


def test_a_p_eagle_starts_from_an_eagle3_and_new_norms_are_told(
    targets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer and fc are the Eagle3's; what it has no counterpart of is fresh."""
    monkeypatch.setattr(logging.getLogger("deepspec"), "propagate", True)
    caplog.set_level("INFO", "deepspec")
    target = load_target(targets / "qwen3", torch.float32)
    _, given, ours = made(tmp_path, "eagle3")
    for kind, changes in (("p_eagle", {"num_layers": 2}), ("eagle3-norms", {})):
        model = started(recipe_for(targets / "qwen3", tmp_path / kind, kind, ours, changes), target)
        assert torch.equal(model.layers[0].self_attn.q_proj.weight, given.layers[0].self_attn.q_proj.weight)
        assert torch.equal(model.fc.weight, given.fc.weight)
    for line in ("mask: new", "1 new layers after them", "fc_norm: new", "norm_output False -> True"):
        assert line in caplog.text


def test_another_head_starts_anew_and_one_more_is_left_out(
    targets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("deepspec"), "propagate", True)
    caplog.set_level("INFO", "deepspec")
    target = load_target(targets / "qwen3", torch.float32)
    _, given, ours = made(tmp_path, "dspark")
    changes = {"markov_rank": 9, "confidence_with_markov": False, "confidence_head": False}
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", "dspark", ours, changes), target)
    assert not model.markov_head.markov_w2.weight.any()
    assert torch.equal(model.fc.weight, given.fc.weight)
    for line in ("markov_head: new, it starts at zero effect", "confidence_head: left out", "markov_rank 6 -> 9"):
        assert line in caplog.text


def test_layers_are_chosen_and_new_ones_are_fresh(targets: Path, tmp_path: Path) -> None:
    target = load_target(targets / "qwen3", torch.float32)
    _, given, ours = made(tmp_path, "dflash")
    fewer = recipe_for(targets / "qwen3", tmp_path / "a", "dflash", ours, {"num_layers": 1}, keep_layers=[1])
    assert torch.equal(started(fewer, target).layers[0].mlp.up_proj.weight, given.layers[1].mlp.up_proj.weight)
    more = recipe_for(targets / "qwen3", tmp_path / "b", "dflash", ours, {"num_layers": 3})
    model = started(more, target)
    fresh = model.algorithm.build(model.config, target.spec, more.seed)
    for index, layer in enumerate((*given.layers, fresh.layers[2])):
        assert torch.equal(model.layers[index].mlp.up_proj.weight, layer.mlp.up_proj.weight)


def test_target_layers_in_another_order_are_the_same_draft(targets: Path, tmp_path: Path) -> None:
    target = load_target(targets / "qwen3", torch.float32)
    _, given, ours = made(tmp_path, "dflash")
    order = {"target_layers": [LAYERS[2], LAYERS[0], LAYERS[1]]}
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", "dflash", ours, order), target)
    features = torch.randn(5, 3, 32)
    torch.testing.assert_close(model.context(features[:, [2, 0, 1]].flatten(1)), given.context(features.flatten(1)))


def test_rows_move_with_their_tokens(targets: Path, tmp_path: Path) -> None:
    target = load_target(targets / "qwen3", torch.float32)
    _, given, ours = made(tmp_path, "dspark-reduced")
    changes = {"draft_vocab_size": 30}  # `started` takes the first thirty tokens
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", "dspark-reduced", ours, changes), target)
    theirs = given.draft_vocab_tokens.tolist()
    moved, rows = model.markov_head.markov_w2.weight, given.markov_head.markov_w2.weight
    known = [token for token in theirs if token < 30]
    assert 0 < len(known) < 20
    assert all(torch.equal(moved[token], rows[theirs.index(token)]) for token in known)
    new = [token for token in range(30) if token not in theirs]
    assert not any(torch.equal(moved[token], row) for token in new for row in rows)


@pytest.mark.parametrize("kind", ["eagle3", "dspark-reduced"])
def test_a_head_of_the_drafts_own_stays_its_own(kind: str, targets: Path, tmp_path: Path) -> None:
    """The loss compares it with the target's; a copy of the target's embedding is not the draft's own."""
    target = load_target(targets / "qwen3", torch.float32)
    _, _, ours = made(tmp_path, kind)
    state = read_weights(ours)
    config = json.loads((ours / "config.json").read_text()) | {"own_head": True, "own_embedding": True}
    save_draft(tmp_path / "own", {**state, "lm_head.weight": 1.5 * state["lm_head.weight"]}, config, {})
    model = started(recipe_for(targets / "qwen3", tmp_path / "run", kind, tmp_path / "own"), target)
    back = load_draft(tmp_path / "own", target)
    back.config = model.config
    assert loss(model) == pytest.approx(loss(back), rel=1e-6)
    assert not torch.equal(model.frozen.head_VD, target.head_weight)
    assert torch.equal(model.frozen.teacher_VD, target.head_weight)
    assert read_weights(tmp_path / "run" / "init").keys() == {*model.state_dict(), "lm_head.weight"}


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    r"algorithm: .*found 'eagle3'; wanted dspark or dflash; set algorithm: eagle3": ("eagle3", "dspark", {}),
    r"algorithm: .*found 'dspark'; wanted dflash; set": ("dspark", "dflash", {}),
    r"target_layer_ids: .*wanted target\.layers \[0, 2, 3\]; set target\.layers: \[0, 1, 2\]":
        ("dflash", "dflash", {"target_layers": [0, 2, 3]}),
    r"mask_token_id: .*found 95; wanted 94 as draft\.mask_token_id; set": ("dflash", "dflash", {"mask_token_id": 94}),
    r"sample_from_anchor: .*found False; wanted True": ("dflash-k-1", "dflash", {}),
    r"num_hidden_layers: .*found 2; .*train\.init\.keep_layers, or set": ("dflash", "dflash", {"num_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(message: str, targets: Path, tmp_path: Path) -> None:
    kind, wanted, changes = REFUSED[message]
    _, _, ours = made(tmp_path, kind)
    with pytest.raises(DraftError, match=message):
        from_draft.keep_draft(recipe_for(targets / "qwen3", tmp_path / "run", wanted, ours, changes))
    assert not (tmp_path / "run" / "init").exists()


def test_another_family_and_layers_that_are_not_there_are_refused(targets: Path, tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, "dflash")
    with pytest.raises(DraftError, match=r"model_type: .*found 'qwen3'; wanted layers of llama"):
        from_draft.keep_draft(recipe_for(targets / "llama", tmp_path / "run", "dflash", ours))
    with pytest.raises(DraftError, match=r"keep_layers: no such layer; found \[2\]; wanted indices below its 2"):
        from_draft.keep_draft(recipe_for(targets / "qwen3", tmp_path / "run", "dflash", ours, keep_layers=[2]))
    with pytest.raises(RecipeError, match=r"train\.init\.forma: unknown key; did you mean 'format'"):
        recipe_for(targets / "qwen3", tmp_path / "run", "dflash", ours, forma="vllm")


def test_a_run_does_not_go_on_from_another_draft(targets: Path, tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, "dflash")
    recipe = recipe_for(targets / "qwen3", tmp_path / "run", "dflash", ours)
    from_draft.keep_draft(recipe)
    begun = from_draft.identity(recipe)
    assert (begun["draft"], begun["format"], begun["algorithm"]) == (str(ours), "deepspec", "dflash")
    moved = ours.rename(tmp_path / "moved")
    assert from_draft.identity(recipe) == begun  # the source is gone, the run has its copy
    assert from_draft.identity(recipe_for(targets / "qwen3", tmp_path / "run", "dflash", moved)) == begun
    state = {name: tensor + 1 for name, tensor in read_weights(moved).items()}
    save_draft(ours, state, json.loads((moved / "config.json").read_text()), {})
    with pytest.raises(CheckpointError, match=r"train\.init\.draft: the run began from another draft"):
        from_draft.identity(recipe)


def test_patterns_freeze_and_the_last_one_decides(targets: Path, tmp_path: Path) -> None:
    spec = load_target(targets / "qwen3", torch.float32).spec
    plain = recipe_for(targets / "qwen3", tmp_path, "dspark", tmp_path).for_target(spec)

    def frozen(*patterns: str) -> frozenset[str]:
        return frozen_weights(replace(plain, train=replace(plain.train, freeze=patterns)), spec)

    every = frozen("*", "!confidence_head.*")
    assert {"fc.weight", "markov_head.markov_w1.weight"} < every
    assert not any(name.startswith("confidence_head.") for name in every)
    assert frozen("confidence_head.*") == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    with pytest.raises(RecipeError, match=r"train\.freeze: matches no weight.*found 'heads\.\*'.*confidence_head\.\*"):
        frozen("heads.*")
    with pytest.raises(RecipeError, match=r"train\.freeze: nothing is left to train"):
        frozen("!fc.*", "*")
