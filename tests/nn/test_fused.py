"""The layer of decoding against the layer of training, and a target's fused decoder against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from deepspec import registry
from deepspec.decoding.fused import FusedDecoder
from deepspec.decoding.kv import PackedTarget
from deepspec.families.base import Rope, Shape
from deepspec.nn import fused
from deepspec.nn.fused import FusedLayer, rotary_table
from deepspec.nn.layer import DraftLayer, Rotary
from deepspec.targets.load import Target, spec_from_config

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.03}  # of the largest value: sums round at its size
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to a few roundings of their type."""
    most = max(float(wanted.float().abs().max()), 1.0) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, atol=ROUNDING[wanted.dtype] * most, rtol=0)


def randomise(module: nn.Module, seed: int) -> None:
    """Weights of unit gain, and norms and biases that are not their first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in [*module.parameters(), *module.buffers()]:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1 + 0.3 * noise)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["qwen3", "llama", "gemma4"]), dtype=DTYPES, joined=st.booleans(), wide=st.booleans(),
    hidden=st.integers(1, 9), kv_heads=st.integers(1, 3), groups=st.integers(1, 3), half=st.integers(1, 6),
    bias=st.booleans(), shared=st.booleans(), gated=st.booleans(), part=st.booleans(), tokens=st.integers(0, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_fused_layer_equals_the_drafts_layer(
    family: str, dtype: torch.dtype, joined: bool, wide: bool, hidden: int, kv_heads: int, groups: int, half: int,
    bias: bool, shared: bool, gated: bool, part: bool, tokens: int, seed: int,
) -> None:  # fmt: skip
    rope = Rope(100.0, partial_factor=0.5 if part and half % 2 == 0 else 1.0)
    shape = Shape(
        hidden_size=4 * hidden, intermediate_size=4 * hidden + 3, num_heads=kv_heads * groups, num_kv_heads=kv_heads,
        head_dim=2 * half, vocab_size=7, norm_eps=1e-6, activation="silu", rope=rope, max_positions=64,
        attention_bias=bias, mlp_bias=bias, k_eq_v=shared,
    )  # fmt: skip
    width = 4 * hidden * (2 if wide else 1)
    layer = DraftLayer(shape, registry.family(family), width, gated)
    randomise(layer, seed)
    layer.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "MOST_JOINED", fused.MOST_JOINED if joined else 0)
        fast = FusedLayer(layer)
    generator = torch.Generator().manual_seed(seed + 1)
    x, residual, mixed = (
        torch.randn(2, tokens, *size, generator=generator).to(dtype)
        for size in ((width,), (4 * hidden,), (kv_heads * groups, 2 * half))
    )
    plain = Rotary(shape)(torch.randint(64, (2, tokens), generator=generator))
    table = rotary_table(plain)
    with torch.no_grad():
        keys, values = layer.self_attn.keys_values(x, plain)
        queries, gate = layer.self_attn.queries_gate(x, plain)
        wanted = [queries, keys, values, keys, values, layer.finish(residual, mixed, gate)]
        packed, *own = fast.queries_keys_values(x, table)
        queries, gate = fast.parted(packed)
        found = [queries, *own, *fast.keys_values(x, table), fast.finish(residual, mixed, gate)]
        if not wide:
            wanted, found = [*wanted, layer.input_layernorm(x)], [*found, fast.input_norm(x)]
    assert fast.scale == layer.self_attn.scale
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


def target_of(config: LlamaConfig | Qwen3Config, dtype: torch.dtype, seed: int = 0) -> Target:
    """A random target of ``config``."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    return Target(model, spec_from_config(model.config, "tiny"))


ROPES = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    qwen3=st.booleans(), dtype=DTYPES, hidden=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.integers(1, 3),
    bias=st.booleans(), window=st.booleans(), rope=st.sampled_from(ROPES), layers=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_fused_decoder_equals_transformers(
    qwen3: bool, dtype: torch.dtype, hidden: int, kv_heads: int, groups: int, bias: bool, window: bool,
    rope: dict[str, object], layers: int, lengths: list[int], seed: int,
) -> None:  # fmt: skip
    size = 8 * hidden * kv_heads * groups  # Llama's config wants a multiple of the heads
    sizes = {
        "vocab_size": 61, "hidden_size": size, "intermediate_size": size + 5, "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * groups, "num_key_value_heads": kv_heads, "head_dim": 8,
        "max_position_embeddings": 256, "attention_bias": bias, "rope_parameters": dict(rope),
    }  # fmt: skip
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} if window else {}
    config = Qwen3Config(**sizes, **sliding) if qwen3 else LlamaConfig(**sizes, mlp_bias=bias)
    target = target_of(config, dtype, seed)
    read = [-1, layers - 1]
    packed = PackedTarget(target, read, len(lengths), 4)
    assert packed._fused is not None
    ids = [torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed + row))
           for row, length in enumerate(lengths)]  # fmt: skip
    batch = packed.cache.plan(torch.tensor(lengths).numpy())
    output = packed.forward(batch, torch.cat(ids))
    packed._fused = None
    plain = PackedTarget(target, read, len(lengths), 4)
    plain._fused = None
    reference = plain.forward(plain.cache.plan(torch.tensor(lengths).numpy()), torch.cat(ids))
    assert_close(output.features, reference.features)
    assert_close(output.last_hidden, reference.last_hidden)


class Adapted(nn.Linear):
    """A linear map that computes more than its weight says, as quantized and adapted ones do."""


def test_only_plain_layers_are_fused() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)

    def small() -> Target:
        return target_of(config, torch.float32)

    assert FusedDecoder.of(small()) is not None
    hooked, adapted, patched = small(), small(), small()
    hooked.decoder.layers[1].mlp.register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    adapted.decoder.layers[1].self_attn.q_proj = Adapted(8, 8, bias=False)  # type: ignore[index, union-attr]
    patched.decoder.layers[0].mlp.forward = lambda x: x  # type: ignore[index, union-attr]
    for target in (hooked, adapted, patched):
        assert FusedDecoder.of(target) is None
