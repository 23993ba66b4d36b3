"""Every algorithm of the registry with every family passes the shipped suite; and what a draft folder refuses."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from algorithm_tools import ALGORITHMS, EXPERTS, random_batch, tiny_draft, tiny_target

from deepspec import registry
from deepspec.decoding.captured import DRAFT, VERIFY
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.subjects import batch_of
from deepspec.drafts import FROZEN, load_draft, save_draft
from deepspec.errors import DraftError
from deepspec.testing.drafter import DecodingSuite, DraftFolderSuite, TrainingLossSuite, TrainingRunSuite

PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11], [2, 90, 4]]
MOST_STEPS = 210


class TestDraftFolder(DraftFolderSuite):
    algorithms = ALGORITHMS


class TestTrainingLoss(TrainingLossSuite):
    algorithms = ALGORITHMS


class TestDecoding(DecodingSuite):
    algorithms, families = ALGORITHMS, ("qwen3",)


@pytest.mark.slow
class TestDecodingOfOtherFamilies(DecodingSuite):
    algorithms, families = ALGORITHMS, tuple(name for name in registry.FAMILIES if name != "qwen3")


class TestNorms(TrainingLossSuite, DecodingSuite):
    """The options of EAGLE-3.1, with a further layer."""

    algorithms, families = ("eagle3",), ("qwen3",)
    section: ClassVar = {"num_layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}


@pytest.mark.slow
class TestNormsOfEveryFamily(DraftFolderSuite, TrainingLossSuite, DecodingSuite):
    algorithms, section = ("eagle3",), TestNorms.section


@pytest.mark.slow
class TestOneNormBeforeTheProjection(DraftFolderSuite, TrainingLossSuite, DecodingSuite):
    algorithms = ("eagle3",)
    section: ClassVar = {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True}


class TestExperts(DraftFolderSuite, TrainingLossSuite, DecodingSuite, TrainingRunSuite):
    """A head with the target's mixture of experts; at stage 3 every rank gathers every expert."""

    algorithms, families, zero_stages = ("mtp",), ("qwen3",), (1, 3)
    section: ClassVar = {"experts": True}
    target_config: ClassVar = {"model_type": "qwen3_moe", "norm_topk_prob": True, **EXPERTS}
    eager_pieces: ClassVar = {DRAFT, VERIFY}  # one expert after the other: a loop whose ends the host reads


class TestTrainingRun(TrainingRunSuite):
    """One family: the matrix of trainings has every algorithm, family, precision and stage."""

    algorithms = ALGORITHMS
    families = ("llama",)


@pytest.mark.parametrize(
    "algorithm", [pytest.param(one, marks=[pytest.mark.slow] * (one in ("p_eagle", "mtp"))) for one in ALGORITHMS]
)
def test_a_draft_that_follows_the_target_is_accepted(algorithm: str) -> None:
    """Trained on the target's own greedy answers, the draft must be accepted clearly more often than a random one."""
    target = tiny_target("qwen3", initializer_range=0.5)
    settings = DecodeSettings(temperature=0.0, max_new_tokens=40)
    answers = generate(target, None, PROMPTS, settings, 4)
    every = {"num_anchors": 40, "keep_ratio": 1.0}  # so that a step trains all that it can
    known = {field.name for field in fields(registry.algorithm(algorithm).config_class) if field.init}
    model = tiny_draft(algorithm, target, **{key: value for key, value in every.items() if key in known})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [prompt + answer.output_ids for prompt, answer in zip(PROMPTS, answers, strict=True)]
    batch = batch_of(target, texts, model.config.target_layers)
    before = after = _accepted(target, model, settings)
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad()
        model(batch).loss().backward()
        optimizer.step()
        if step % 30 == 0 and (after := _accepted(target, model, settings)) > 2.0:
            break
    assert after > 2.0 > before


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
