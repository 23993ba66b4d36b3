"""``train.init: target``: the draft's layers are the target's last ones, and read the target's states as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from algorithm_tools import LAYERS, tiny_config, tiny_draft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepspec.errors import TargetError
from deepspec.recipe import TargetSection
from deepspec.registry import ALGORITHMS
from deepspec.targets import Target, load_target
from deepspec.training import initial as module
from deepspec.training.initial import warm_start


def saved(folder: Path, family: str) -> Target:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder)
    return load_target(folder, torch.float32)


def section(folder: Path) -> TargetSection:
    return TargetSection(path=str(folder), layers=(0, 1))


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_context_keys_and_values_are_the_targets_own(
    tmp_path: Path, family: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NOISE", 0.0)
    target = saved(tmp_path, family)
    draft = tiny_draft(algorithm, target, target_layers=[0, LAYERS - 3])
    warm_start(draft, target.spec, section(tmp_path))
    ids = torch.randint(0, 90, (1, 9))
    own = target.model.model.layers[LAYERS - 2]
    seen: dict[str, torch.Tensor] = {}
    for name in ("k_proj", "v_proj"):
        getattr(own.self_attn, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    features = target.forward(ids, (0, LAYERS - 3)).features
    layer = draft.layers[0].self_attn
    context = draft.context(features)
    torch.testing.assert_close(layer.k_proj(context), seen["k_proj"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.v_proj(context), seen["v_proj"], atol=1e-5, rtol=1e-5)
    assert torch.equal(draft.layers[1].mlp.up_proj.weight, target.model.model.layers[LAYERS - 1].mlp.up_proj.weight)
    assert torch.equal(draft.norm.weight, target.model.model.norm.weight)


def test_eagle3_reads_its_hidden_half_as_the_target_does(tmp_path: Path) -> None:
    target = saved(tmp_path, "qwen3")
    draft, fresh = tiny_draft("eagle3", target), tiny_draft("eagle3", target)
    warm_start(draft, target.spec, section(tmp_path))
    own, size = target.model.model.layers[LAYERS - 1], target.spec.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        wide = getattr(draft.layers[0].self_attn, name).weight
        assert torch.equal(wide[:, size:], getattr(own.self_attn, name).weight)
        assert torch.equal(wide[:, :size], getattr(fresh.layers[0].self_attn, name).weight[:, :size])
    assert torch.equal(draft.layers[0].hidden_norm.weight, own.input_layernorm.weight)
    expected = module.NOISE * fresh.fc.weight
    expected[:, -size:] += torch.eye(size)
    assert torch.equal(draft.fc.weight, expected)


@pytest.mark.parametrize("algorithm", ["dflash", "dspark", "eagle3"])
def test_a_layers_buffers_are_copied_too(tmp_path: Path, algorithm: str) -> None:
    """Gemma4 ends each layer by its scalar: a copy without it is another layer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config("gemma4"))
    model.model.layers[LAYERS - 1].layer_scalar.fill_(0.375)
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, torch.float32)
    draft = tiny_draft(algorithm, target, num_layers=1)
    warm_start(draft, target.spec, section(tmp_path))
    assert draft.layers[0].layer_scalar.tolist() == [0.375]
    assert torch.equal(draft.layers[0].mlp.up_proj.weight, model.model.layers[LAYERS - 1].mlp.up_proj.weight)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_drafter_starts_from_the_targets_last_layers(tmp_path: Path, algorithm: str, family: str) -> None:
    """What an algorithm adds to its layers (DFlash 2's convolutions) the target has not: it starts as it is."""
    target = saved(tmp_path, family)
    draft, fresh = tiny_draft(algorithm, target), tiny_draft(algorithm, target).state_dict()
    warm_start(draft, target.spec, section(tmp_path))
    depth, layers = len(draft.layers), target.model.model.layers
    for number, layer in enumerate(draft.layers):
        assert torch.equal(layer.mlp.down_proj.weight, layers[LAYERS - depth + number].mlp.down_proj.weight)
        for name in (one for one in layer.state_dict() if "_conv." in one):
            assert torch.equal(layer.state_dict()[name], fresh[f"layers.{number}.{name}"])
    assert any("_conv." in name for name in fresh) == (algorithm == "dflash2")


def test_norms_on_the_heads_start_fresh_beside_a_targets_layers_without_them(tmp_path: Path) -> None:
    """llama.cpp takes block drafters with such norms alone, of a Llama target too."""
    target = saved(tmp_path, "llama")
    draft = tiny_draft("dspark", target, target_layers=[0, LAYERS - 3], layers={"family": "qwen3"})
    fresh = {name: part.clone() for name, part in draft.layers[1].state_dict().items() if "_norm" in name}
    warm_start(draft, target.spec, section(tmp_path))
    own, layer = target.model.model.layers[LAYERS - 1], draft.layers[1]
    for name in ("q_norm", "k_norm"):
        assert torch.equal(getattr(layer.self_attn, name).weight, fresh[f"self_attn.{name}.weight"])
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
        assert torch.equal(layer.get_submodule(name).weight, own.get_submodule(name).weight)


@pytest.mark.parametrize(("target_family", "draft_family"), [("qwen3", "llama"), ("llama", "gemma4")])
def test_layers_with_other_arithmetic_are_refused(tmp_path: Path, target_family: str, draft_family: str) -> None:
    target = saved(tmp_path, target_family)
    draft = tiny_draft("dspark", target, layers={"family": draft_family})
    with pytest.raises(TargetError, match=r"with draft layers of .*set train\.init: random"):
        warm_start(draft, target.spec, section(tmp_path))


def test_layers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    target = saved(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(5, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"another size: model\.layers\.3\.mlp\.up_proj\.weight"):
        warm_start(tiny_draft("dflash", target), target.spec, section(tmp_path))
    path.unlink()
    with pytest.raises(TargetError, match=r"store the target as safetensors.*train\.init: random"):
        warm_start(tiny_draft("dflash", target), target.spec, section(tmp_path))
