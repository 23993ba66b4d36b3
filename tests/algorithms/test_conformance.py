"""Every algorithm for every family: loss, training steps, save, reload, greedy decoding equal to the target's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from algorithm_tools import ALGORITHMS, FAMILIES, random_batch, tiny_draft, tiny_target

from deepspec import registry
from deepspec.batch import Batch, Supervision
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import FROZEN, load_draft, save_draft
from deepspec.errors import DraftError

PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11], [2, 90, 4]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trains_saves_loads_and_decodes_losslessly(algorithm: str, family: str, tmp_path: Path) -> None:
    target = tiny_target(family)
    model = tiny_draft(algorithm, target)
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=1e-3), random_batch([40, 25])
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(batch).loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    owner = model.algorithm
    config = owner.config_json(model.config, target.spec)
    save_draft(tmp_path / "draft", model.state_dict(), config, {"test": True})
    loaded = load_draft(tmp_path / "draft", target)
    assert loaded.algorithm.name == algorithm
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).weighted_sum(), _same_loss(model, loaded, batch), atol=1e-4, rtol=1e-5)
    settings = DecodeSettings(temperature=0.0, max_new_tokens=24, stop_token_ids=(2,))
    plain = generate(target, None, PROMPTS, settings, 4)
    for batch_size in (1, 8):
        drafter = loaded.algorithm.drafter(loaded, batch_size, 64)
        drafted = generate(target, drafter, PROMPTS, settings, batch_size)
        assert [d.output_ids for d in drafted] == [p.output_ids for p in plain]


def _same_loss(model, loaded, batch):
    """A config.json carries no loss weights, so the live model's loss is taken with the loaded config."""
    kept, model.config = model.config, loaded.config
    value = model(batch).weighted_sum()
    model.config = kept
    return value


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_draft_that_follows_the_target_is_accepted(algorithm: str) -> None:
    """Trained on the target's own greedy answers, the draft must be accepted clearly more often than a random one."""
    target = tiny_target("qwen3", initializer_range=0.5)
    settings = DecodeSettings(temperature=0.0, max_new_tokens=40)
    answers = generate(target, None, PROMPTS, settings, 4)
    model = tiny_draft(algorithm, target, **({} if algorithm == "eagle3" else {"num_anchors": 40}))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batches = [_answer_batch(target, PROMPTS[i] + a.output_ids, len(PROMPTS[i])) for i, a in enumerate(answers)]
    before = _accepted(target, model, settings)
    for _ in range(60):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).loss().backward()
            optimizer.step()
    after = _accepted(target, model, settings)
    assert after > 2.0 > before


def _answer_batch(target, tokens, prompt_length):

    ids = torch.tensor([tokens])
    seen = target.forward(ids, (-1, 1, 3))
    mask = (torch.arange(len(tokens)) >= prompt_length)[None]
    supervision = Supervision(mask, torch.tensor([len(tokens)]), (prompt_length,), 0, 0)
    return Batch(supervision, ids, seen.features, seen.last_hidden)


def _accepted(target, model, settings):
    drafted = generate(target, model.algorithm.drafter(model, 4, 80), PROMPTS, settings, 4)
    lengths = [n for d in drafted for n in d.acceptance_lengths]
    return sum(lengths) / len(lengths)


def test_frozen_weights_may_travel_with_the_draft(tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    model = tiny_draft("dspark", target)
    config = model.algorithm.config_json(model.config, target.spec)
    frozen = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    save_draft(tmp_path / "whole", {**model.state_dict(), **frozen}, config, {})
    batch = random_batch([20])
    alone, attached = load_draft(tmp_path / "whole"), load_draft(tmp_path / "whole", target)
    torch.testing.assert_close(alone(batch).loss(), attached(batch).loss())
    save_draft(tmp_path / "bare", model.state_dict(), config, {})
    with pytest.raises(DraftError, match="has no embedding and head"):
        load_draft(tmp_path / "bare")
    with pytest.raises(DraftError, match="already holds a draft"):
        save_draft(tmp_path / "bare", model.state_dict(), config, {})


def test_loading_is_strict(tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    model = tiny_draft("eagle3", target)
    config = model.algorithm.config_json(model.config, target.spec)
    state = model.state_dict()
    save_draft(tmp_path / "extra", {**state, "layers.9.weight": torch.zeros(1)}, config, {})
    save_draft(tmp_path / "less", {k: v for k, v in state.items() if k != "norm.weight"}, config, {})
    save_draft(tmp_path / "other", state, {**config, "num_target_layers": 7}, {})
    save_draft(tmp_path / "engine", state, {**config, "architectures": ["DFlashDraftModel"]}, {})
    wanted = {"extra": "layers.9.weight", "less": "norm.weight", "other": "num_target_layers", "engine": "import it"}
    for name, text in wanted.items():
        with pytest.raises(DraftError, match=text):
            load_draft(tmp_path / name, target)
    with pytest.raises(DraftError, match="hidden_size"):
        load_draft(tmp_path / "extra", tiny_target("llama", hidden_size=64))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_k_eq_v": False, "num_global_key_value_heads": None},
        {"final_logit_softcapping": None},
        {"num_global_key_value_heads": 2},
    ],
)
def test_gemma4_variants(changes: dict, tmp_path: Path) -> None:
    target = tiny_target("gemma4", **changes)
    model = tiny_draft("dspark", target)
    assert (model.layers[0].self_attn.v_proj is None) == target.spec.config["attention_k_eq_v"]
    settings = DecodeSettings(temperature=0.0, max_new_tokens=16)
    plain = generate(target, None, PROMPTS, settings, 4)
    drafted = generate(target, model.algorithm.drafter(model, 4, 64), PROMPTS, settings, 4)
    assert [d.output_ids for d in drafted] == [p.output_ids for p in plain]
    with torch.no_grad():
        model.layers[0].layer_scalar.fill_(0.5)
    config = model.algorithm.config_json(model.config, target.spec)
    save_draft(tmp_path / "draft", model.state_dict(), config, {})
    assert float(load_draft(tmp_path / "draft", target).layers[0].layer_scalar) == 0.5


def test_gemma4_config_fields_of_old_and_new_transformers() -> None:
    family = registry.family("gemma4")
    new = tiny_target("gemma4").spec.config
    assert "per_layer_config" in new
    assert "global_head_dim" not in new
    old = {k: v for k, v in new.items() if k != "per_layer_config"}
    old |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    assert family.read_shape(new) == family.read_shape(old)
    assert family.read_shape(family.draft_config(new, 2)) == family.read_shape(new)
    assert family.read_shape(new).head_dim == 16


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_reduced_vocabulary_drafts_within_it_and_stays_lossless(algorithm: str, tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    model = tiny_draft(algorithm, target, draft_vocab_size=20)
    kept = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:20].sort().values
    model.set_draft_vocab(kept)
    batch = random_batch([30])
    model(batch).loss().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        logits = model.expand_to_target_vocab(model.head.logits(torch.randn(3, 32)))
    assert logits.isfinite().nonzero()[:, 1].unique().tolist() == kept.tolist()
    config = model.algorithm.config_json(model.config, target.spec)
    save_draft(tmp_path / "draft", model.state_dict(), config, {})
    loaded = load_draft(tmp_path / "draft", target)
    assert loaded.draft_vocab_tokens.tolist() == kept.tolist()
    assert loaded.t2d.nonzero()[:, 0].tolist() == kept.tolist()
    settings = DecodeSettings(temperature=0.0, max_new_tokens=20)
    plain = generate(target, None, PROMPTS, settings, 4)
    drafted = generate(target, loaded.algorithm.drafter(loaded, 4, 64), PROMPTS, settings, 4)
    assert [d.output_ids for d in drafted] == [p.output_ids for p in plain]
    assert all(set(proposal[1:]) <= set(kept.tolist()) for d in drafted for proposal in d.proposals)
