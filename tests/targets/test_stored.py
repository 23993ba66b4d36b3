"""Which weights are the target's: the same for the whole model and for its ends alone, or a clear word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from deepspec import registry
from deepspec.errors import TargetError
from deepspec.recipe import TargetSection
from deepspec.targets import (
    Target,
    TargetEmbeddings,
    load_spec,
    load_target,
    load_target_embeddings,
)
from deepspec.targets.digests import weights_digest
from deepspec.targets.served import load_final_norm
from deepspec.training.initial import warm_start

HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
MLP = "model.layers.2.mlp.down_proj.weight"
LOADS: tuple[Callable[..., Any], ...] = (load_target, load_target_embeddings)
EXPERTS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def saved(folder: Path, config: Any) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], config: Any = None) -> Path:
    """A saved Llama (or another) whose tensors were changed."""
    path = saved(folder, config or tiny_config("llama")) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def agreeing(path: Path, dtype: torch.dtype = torch.float32) -> TargetEmbeddings:
    """The ends of a target, equal to those of the whole."""
    whole, alone = load_target(path, dtype), load_target_embeddings(path, dtype)
    assert not isinstance(alone, Target)
    assert torch.equal(whole.embed_weight, alone.embed_weight)
    assert torch.equal(whole.head_weight, alone.head_weight)
    return alone


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma4"])
def test_another_head_in_the_files_of_a_tied_target_is_the_head(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = torch.randn(96, 32)
    config = tiny_config(kind, tie_word_embeddings=True)
    alone = agreeing(changed(tmp_path, lambda tensors: tensors.update({HEAD: other}), config))
    assert torch.equal(alone.head_weight, other)
    assert capsys.readouterr().err.count("the files hold another lm_head; it is the head here") == 2


BROKEN: dict[str, tuple[str, Any, str]] = {
    "an index without a map": ("model.safetensors.index.json", {"metadata": {}}, "weight_map: not an index"),
    "an index of another form": ("model.safetensors.index.json", {"weight_map": []}, r"not an index; found \[\]"),
    "a generation config of another form": ("generation_config.json", [], "not a config"),
    "a rope of no known kind": ("config.json", {"rope_parameters": {"rope_type": "ntk"}}, "unknown kind of RoPE"),
    "longrope by its old name": ("config.json", {"rope_parameters": {"rope_type": "su"}}, "change with the longest"),
    "a rope without its factor": ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, "factor"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("load", LOADS)
def test_a_broken_file_beside_the_weights_is_one_line(tmp_path: Path, what: str, load: Callable[..., Any]) -> None:
    name, values, message = BROKEN[what]
    saved(tmp_path, tiny_config("llama"))
    if name == "config.json":
        values = json.loads((tmp_path / name).read_text()) | values
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(TargetError, match=message):
        load(tmp_path, torch.float32)
    if "index" in name:
        with pytest.raises(TargetError, match=message):
            weights_digest(tmp_path)


def test_the_same_head_twice_in_the_files_is_one(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    alone = agreeing(changed(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}), config))
    assert alone.head_weight is alone.embed_weight


def test_heads_that_differ_by_less_than_the_dtype_are_one(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    path = changed(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBED] * (1 + 2**-12)}), config)
    assert agreeing(path).head_weight is not agreeing(path).embed_weight
    exact = load_target_embeddings(path, torch.bfloat16)
    assert torch.equal(exact.head_weight, load_target(path, torch.bfloat16).head_weight)


def test_a_tied_target_may_be_stored_under_the_name_of_its_head(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    alone = agreeing(changed(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBED)}), config))
    assert alone.head_weight is alone.embed_weight


def test_the_single_file_comes_before_an_old_index(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_config("llama"))
    old = saved(tmp_path / "old", tiny_config("llama", initializer_range=0.5))
    (old / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(path / "model.safetensors"), "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert torch.equal(agreeing(path).head_weight, load_file(path / "model.safetensors")[HEAD])


def test_a_file_that_the_index_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_config("llama"))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {HEAD: "model-7.safetensors"}})
    )
    for load in LOADS:
        with pytest.raises(TargetError, match=r"model-7\.safetensors"):
            load(path, torch.float32)


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "head": (lambda tensors: tensors.pop(HEAD), f"missing: {HEAD}"),
    "layer": (lambda tensors: tensors.pop(MLP), f"missing: {MLP}"),
    "several": (lambda tensors: [tensors.pop(name) for name in (MLP, NORM)], f"missing: {MLP}, {NORM}"),
    "all of the layers": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name], "and 28 more",
    ),
    "unknown": (lambda tensors: tensors.update({"v_head.weight": torch.ones(3)}), r"unexpected: .*v_head\.weight"),
    "one layer more": (
        lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)}),
        r"unexpected: model\.layers\.4\.mlp\.up_proj\.weight",
    ),
    "size": (
        lambda tensors: tensors.update({EMBED: torch.ones(100, 32)}), rf"another size: {EMBED} \(100, 32\) for \(96",
    ),
}  # fmt: skip


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, kind: str, load: Callable[..., Any]) -> None:
    change, words = MISFITS[kind]
    with pytest.raises(TargetError, match=words):
        load(changed(tmp_path, change), torch.float32)


def test_what_transformers_leaves_out_is_no_fault(tmp_path: Path) -> None:
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    agreeing(changed(tmp_path, lambda tensors: tensors.update(extra)))


def test_names_without_their_prefix_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    path = changed(tmp_path, shorten)
    agreeing(path)
    assert torch.equal(load_final_norm(path, torch.float32).weight, load_target(path).decoder.norm.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma4"])
def test_frequencies_of_a_bf16_target_are_not_rounded(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, tiny_config(kind))
    exact, half = (dict(load_target(path, dtype).model.named_buffers()) for dtype in (torch.float32, torch.bfloat16))
    names = [name for name in exact if name.endswith("inv_freq")]
    assert names
    assert all(torch.equal(half[name], exact[name]) for name in names)


def test_a_target_with_experts_is_read_by_its_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Qwen3MoeConfig(**EXPERTS))
    assert any("experts.3.up_proj" in name for name in load_file(path / "model.safetensors"))  # stored one by one
    agreeing(path)

    def never(*_: Any) -> Target:
        raise AssertionError("the whole target was loaded")

    monkeypatch.setattr("deepspec.targets.load.load_target", never)
    assert load_target_embeddings(path, torch.bfloat16).dtype == torch.bfloat16


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.2.down_proj.weight"
    path = changed(tmp_path, lambda tensors: tensors.pop(lost), Qwen3MoeConfig(**EXPERTS))
    for load in LOADS:
        with pytest.raises(TargetError, match=r"model\.layers\.1\.mlp\.experts\.down_proj \(3, 32, 16\) for \(4,"):
            load(path, torch.float32)


def test_a_draft_of_a_target_with_experts_has_dense_layers(tmp_path: Path) -> None:
    spec = load_spec(saved(tmp_path, Qwen3MoeConfig(**EXPERTS)))
    algorithm = registry.algorithm("eagle3")
    config = algorithm.parse({"target_layers": [0, 1, 2], "num_layers": 1, "ttt_length": 2}, spec)
    written = algorithm.config_json(config, spec)
    assert (written["model_type"], written["target_model_type"]) == ("qwen3", "qwen3_moe")
    assert not [key for key in written if "expert" in key or "moe" in key.replace("target_model_type", "")]
    model = algorithm.build(config, spec)
    assert tuple(model.layers[0].mlp.up_proj.weight.shape) == (48, 32)
    section = TargetSection(path=str(tmp_path), layers=(0, 1, 2), dtype="float32")
    with pytest.raises(TargetError, match=r"layers\.3\.mlp\..*train\.init: random"):
        warm_start(model, spec, section)


def test_a_config_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_config("llama")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 33}))
    with pytest.raises(TargetError, match=r"hidden size \(33\) is not a multiple"):
        load_spec(tmp_path)
