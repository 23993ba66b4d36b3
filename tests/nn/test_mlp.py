"""A mixture of experts: transformers' own blocks, all experts computed for every token, and both ways to run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from deepspec import registry
from deepspec.families.base import DRAFT_EXPERTS, Experts, Shape
from deepspec.nn.mlp import ExpertMLP, grouped, looped
from deepspec.nn.start import initialise

HIDDEN, TOKENS = 32, 23
SIZES = {
    "vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 16}
BLOCKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2_moe": (Qwen2MoeSparseMoeBlock, SHARED),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, {"norm_topk_prob": True}),
    "qwen3_moe, weights as they are": (Qwen3MoeSparseMoeBlock, {"norm_topk_prob": False}),
    "qwen3_next": (Qwen3NextSparseMoeBlock, SHARED),
    "qwen3_5_moe_text": (Qwen3_5MoeSparseMoeBlock, SHARED),
}


def shape_of(experts: Experts | None = None) -> Shape:
    config = {**SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 64}
    return replace(registry.family("qwen3").read_shape(config), experts=experts)


def mixture(experts: Experts, seed: int = 0) -> ExpertMLP:
    model = ExpertMLP(shape_of(), experts)
    initialise(model, 0.4, seed)
    return model


def plain(model: ExpertMLP, x: Tensor) -> Tensor:
    """Every expert of every token, times its weight, which is 0 where it was not chosen."""
    shares = (x @ model.gate.weight.T).softmax(-1)
    kept = shares >= shares.topk(model.sizes.per_token).values[:, -1:]
    shares = torch.where(kept, shares, 0.0)
    if model.sizes.normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    gate, up = torch.einsum("td,eid->tei", x, model.experts.gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("tei,edi->ted", torch.nn.functional.silu(gate) * up, model.experts.down_proj)
    mixed = (shares[..., None] * outputs).sum(1)
    if model.sizes.shared_width:
        mixed = mixed + (x @ model.shared_expert_gate.weight.T).sigmoid() * model.shared_expert(x)
    return mixed


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_the_block_of_transformers_with_its_names(kind: str) -> None:
    block_class, changes = BLOCKS[kind]
    config: Any = AutoConfig.for_model(kind.partition(",")[0], **{**SIZES, **changes})
    block = block_class(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(0.0, 0.4)
    read = registry.family("qwen3").read_shape(
        {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, **config.to_dict(), **SIZES, DRAFT_EXPERTS: True}
    )
    assert read.experts is not None
    ours = ExpertMLP(read, read.experts)
    ours.load_state_dict(block.state_dict())
    x = torch.randn(2, TOKENS, HIDDEN)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(found), block(wanted), atol=1e-5, rtol=1e-5)
    ours(found).square().sum().backward()
    block(wanted).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, atol=1e-4, rtol=1e-4)
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(block.named_parameters()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("experts", [Experts(8, 3, 24, 16), Experts(8, 3, 24), Experts(5, 1, 8, normalised=False)])
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_it_is_every_expert_weighed(experts: Experts, tokens: int) -> None:
    model, x = mixture(experts), torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    weights = dict(model.named_parameters())
    found, wanted = model(x), plain(model, x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), list(weights.values())) for out in (found, wanted)]
    for name, a, b in zip(weights, *gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)
    if not experts.normalised or experts.per_token > 1:  # the weight of one alone is always 1
        assert gradients[0][list(weights).index("gate.weight")].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_loop(dtype: torch.dtype) -> None:
    """Two experts get no row."""
    weight = mixture(Experts(8, 3, 24)).experts.to(dtype).gate_up_proj
    rows = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    ends = torch.tensor([0, 4, 5, 5, 9, 15, 16, 20], dtype=torch.int32)
    outputs = [product(rows, weight, ends) for product in (grouped, looped)]
    near = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*outputs, atol=near, rtol=near)
    gradients = [torch.autograd.grad(out.float().square().mean(), weight)[0] for out in outputs]
    torch.testing.assert_close(*gradients, atol=near, rtol=near)
    assert not gradients[0][0].any()
    assert gradients[0][1].any()


def test_the_same_modules_are_called_whichever_experts_the_tokens_chose() -> None:
    """ZeRO stage 3 gathers a module's weights when it is called: a rank that calls others ends the run."""
    model = mixture(Experts(8, 1, 24, 16))
    called: list[list[str]] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: called[-1].append(name))
    chosen = []
    for tokens in (torch.zeros(0, HIDDEN), torch.ones(4, HIDDEN), torch.randn(40, HIDDEN)):
        called.append([])
        model(tokens)
        chosen.append(len(model.gate(tokens).argmax(-1).unique()))
        called[-1].remove("gate")
    assert chosen[0] < chosen[1] < chosen[2]
    assert called[0] == called[1] == called[2]


def test_all_experts_take_part_in_a_step_without_a_token() -> None:
    model = mixture(Experts(8, 3, 24, 16))
    model(torch.zeros(0, HIDDEN)).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
