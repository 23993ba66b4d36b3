"""What is found in a model and its config, and what is said where something cannot be found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from algorithm_tools import tiny_draft
from model_types import config_of
from torch import nn
from transformers import AutoConfig, LlamaConfig

from deepspec import registry
from deepspec.data.conversations import usable_row
from deepspec.data.messages import Unusable
from deepspec.data.sources import to_messages
from deepspec.errors import RecipeError, TargetError
from deepspec.families.plain import plain_config
from deepspec.registry import FAMILIES
from deepspec.targets.adaptor import auto_class, check_logits, find_parts, flat_config, thinking_keyword
from deepspec.targets.load import Target, load_target, load_target_embeddings, spec_from_config
from deepspec.testing import tiny
from deepspec.training.from_draft import frozen_pair


def saved(folder: Path, model_type: str, **changes: Any) -> Path:
    """A tiny random model of a type, in files of several shards."""
    config = config_of(model_type, **changes)
    torch.manual_seed(0)
    model = auto_class(config, model_type).from_config(config).float()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        nn.init.normal_(bias)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_a_bias_of_the_head_is_in_the_logits_and_no_draft_is_trained_without_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "phi", "phi")
    target, alone = load_target(folder, torch.float32), load_target_embeddings(folder, torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    own: Any = target.model
    torch.testing.assert_close(target.logits(target.forward(ids, ()).last_hidden), own(input_ids=ids).logits)
    assert target.head_bias is not None
    assert alone.head_bias is not None
    assert torch.equal(alone.head_bias, target.head_bias)
    recipe: Any = SimpleNamespace(train=SimpleNamespace(init="random"))
    with pytest.raises(TargetError, match=r"output head has a bias.*a matrix alone"):
        frozen_pair(recipe, alone)


@pytest.mark.parametrize(
    ("model_type", "scale", "softcap"),
    [("granite", 0.5, None), ("cohere", 0.25, None), ("falcon_h1", 0.5, None), ("hyperclovax", 2.0, None),
     ("gemma2", 1.0, 5.0), ("gpt_oss", 1.0, None)],
)  # fmt: skip
def test_scale_and_softcap_of_the_logits_are_the_drafts_too(
    model_type: str, scale: float, softcap: float | None
) -> None:
    config = config_of(model_type)
    target = Target(auto_class(config, "").from_config(config).float(), spec_from_config(config, model_type))
    check_logits(target)
    assert (target.spec.logit_scale, target.spec.softcap) == (scale, softcap)
    draft = tiny_draft("dspark", target)
    assert (draft.shape.logit_scale, draft.shape.softcap) == (scale, softcap)
    hidden = torch.randn(3, target.spec.hidden_size)
    torch.testing.assert_close(draft.head.logits(hidden), target.logits(hidden))
    written = draft.algorithm.config_json(draft.config, target.spec)
    assert registry.family("llama").read_shape(written) == draft.shape


def test_logits_that_are_more_than_was_found_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "granite", "granite")
    monkeypatch.setattr("deepspec.targets.load.logit_scale_of", lambda _config: 1.0)
    with pytest.raises(TargetError, match=r"its logits are more than bias, scale and softcap.*granite.*off by"):
        load_target(folder, torch.float32)


def test_what_cannot_be_found_is_one_line_that_names_it() -> None:
    with pytest.raises(TargetError, match=r"vit: model_type: no class of transformers generates text.*found 'vit'"):
        auto_class(AutoConfig.for_model("vit"), "vit")
    sizeless: Any = SimpleNamespace(model_type="odd", to_dict=lambda: {"hidden_size": 8, "vocab_size": 9})
    sizeless.get_text_config = lambda: sizeless
    with pytest.raises(TargetError, match=r"does not state how large the model is.*num_hidden_layers"):
        flat_config(sizeless, "odd")
    model: Any = auto_class(LlamaConfig(), "").from_config(config_of("llama"))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(TargetError, match=r"no decoder found.*LlamaForCausalLM.*list of 4 layers"):
        find_parts(model)
    model.lm_head = None
    with pytest.raises(TargetError, match="no output head found"):
        find_parts(model)


@pytest.mark.parametrize(
    ("model_type", "heads", "kv_heads", "head_dim", "width"),
    [
        ("deepseek_v3", 56, 8, 128, 18_432),  # grouped heads for latent attention; 8 active experts and a shared one
        ("gpt_oss", 64, 8, 64, 11_520),  # 4 active experts of 2880
        ("mixtral", 32, 8, 128, 28_672),  # 2 of 14336
        ("qwen3_next", 16, 2, 256, 5_632),  # 10 of 512 and a shared one of 512
        ("mistral", 32, 8, 128, 14_336),
        ("gpt2", 12, 12, 64, 3_072),
    ],
)  # fmt: skip
def test_default_layers_have_the_width_that_a_token_passes_through(
    model_type: str, heads: int, kv_heads: int, head_dim: int, width: int
) -> None:
    """Of the sizes that transformers' own config class has."""
    plain = plain_config(flat_config(AutoConfig.for_model(model_type), model_type))
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert tuple(plain[name] for name in names) == (heads, kv_heads, head_dim, width)


def test_draft_layers_are_chosen_by_the_recipe_and_kept_by_the_folder() -> None:
    target = tiny.tiny_target("gemma4")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    layers = {
        "family": "qwen3",
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 40,
        "rope": rope,
    }
    draft = tiny_draft("dspark", target, layers=layers)
    shape = draft.shape
    assert draft.family.name == "qwen3"
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (2, 1, 16, 40)
    assert (shape.rope.theta, shape.softcap) == (5e5, 5.0)
    written = json.loads(json.dumps(draft.algorithm.config_json(draft.config, target.spec)))
    assert written["model_type"] == "qwen3"
    assert written["architectures"] == ["Qwen3DSparkModel"]
    assert draft.family.read_shape(written) == shape
    own = tiny_draft("dspark", target, layers={"intermediate_size": 40})
    assert own.family.name == "gemma4"
    assert own.shape.intermediate_size == 40
    assert own.shape.head_dim == target.spec.shape.head_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_recipe_does_not_state_stays_the_targets_own(family: str) -> None:
    """Keys as values, a partly turned head, biases: one other size changes that size alone."""
    target = tiny.tiny_target(family, attention_bias=True)
    own, draft = target.spec.shape, tiny_draft("dspark", target, layers={"intermediate_size": 40})
    assert draft.shape == replace(own, intermediate_size=40)
    written = json.loads(json.dumps(draft.algorithm.config_json(draft.config, target.spec)))
    assert draft.family.read_shape(written) == draft.shape
    turned = tiny_draft("dspark", target, layers={"num_heads": 2, "num_kv_heads": 1, "rope": {"rope_type": "default"}})
    assert (turned.shape.num_heads, turned.shape.num_kv_heads, turned.shape.head_dim) == (2, 1, own.head_dim)
    assert turned.shape.rope.theta == own.rope.theta


def test_layers_of_gemma4_that_are_all_alike_have_their_own_head_size() -> None:
    target = tiny.tiny_target("gemma4")
    draft = tiny_draft("dspark", target, layers={"head_dim": 24})
    published = draft.algorithm.config_json(draft.config, target.spec)
    through = AutoConfig.for_model(**published).to_dict()  # as another tool writes it
    assert draft.family.read_shape(through).head_dim == 24


@pytest.mark.parametrize("family", FAMILIES)
def test_a_targets_softcap_and_scale_of_the_logits_are_the_drafts_in_every_family(family: str) -> None:
    target = tiny.tiny_target("llama")
    target.spec = replace(target.spec, config={**target.spec.config, "model_type": "cohere", "logit_scale": 0.25,
                                               "final_logit_softcapping": 5.0}, model_type="cohere")  # fmt: skip
    shape = tiny_draft("dspark", target, layers={"family": family}).shape
    assert (shape.softcap, shape.logit_scale) == (5.0, 0.25)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"family": "lama"}, r"draft\.layers\.family: unknown family.*did you mean 'llama'"),
        ({"num_heads": 3, "num_kv_heads": 2}, r"draft\.layers\.num_kv_heads.*divisor of 3"),
        ({"head_dim": 7}, r"draft\.layers\.head_dim.*even"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}}, r"draft\.layers\.rope\.rope_type: unknown kind.*'dynamic'"),
        ({"rope": {"rope_type": "yarn"}}, r"draft\.layers\.rope\.factor: a yarn RoPE needs it"),
        ({"rope": {"theta": 5e5}}, r"draft\.layers\.rope\.theta: unknown key.*did you mean 'rope_theta'"),
        ({"rope": {"rope_theta": "1e6"}}, r"draft\.layers\.rope\.rope_theta: wrong value; found '1e6'"),
        ({"rope": {"partial_rotary_factor": 1.5}}, r"draft\.layers\.rope\.partial_rotary_factor.*at most 1"),
        ({"width": 7}, r"draft\.layers\.width: unknown key"),
    ],
)
def test_draft_layers_that_cannot_be_are_refused_by_key(layers: dict[str, Any], words: str) -> None:
    target = tiny.tiny_target("llama")
    with pytest.raises(RecipeError, match=words):
        registry.algorithm("dspark").parse(tiny.tiny_section("dspark", layers=layers), target.spec)


def test_the_thinking_switch_is_what_the_template_asks_for() -> None:
    assert thinking_keyword("{% if enable_thinking is defined %}<think>{% endif %}") == "enable_thinking"
    assert thinking_keyword("{%- if thinking %}{{ '</think>' }}{%- endif %}") == "thinking"
    assert thinking_keyword("thinking {{ 'thinking' }} {{ message.thinking }} {{ messages }}") is None
    assert thinking_keyword(None) is None


@pytest.mark.parametrize(("kind", "words"), [("image", "an image"), ("image_url", "an image"), ("video", "a video")])
def test_a_conversation_with_images_is_refused_by_name(kind: str, words: str) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": kind}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    assert usable_row(json.dumps({"id": "a", "messages": messages}).encode()) == (
        f"a message with {words}: targets are given text alone"
    )
    with pytest.raises(Unusable, match=f"a message with {words}"):
        to_messages({"messages": messages})
