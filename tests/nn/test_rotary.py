"""Rotary tables stay fp32 in every dtype; the kinds that transformers knows are taken from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from algorithm_tools import random_batch, tiny_draft, tiny_target
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from deepspec.families.base import Rope
from deepspec.nn.layer import Rotary, rotate


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_bf16_model_rotates_as_fp32_at_position_4000(family: str) -> None:
    target = tiny_target(family)
    model = tiny_draft("dspark", target)
    positions = torch.tensor([0, 1, 4000, 4095])
    exact = model.rotary(positions)
    model.to(torch.bfloat16)
    for cast, kept in zip(model.rotary(positions), exact, strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(cast, kept)


def test_bf16_attention_angles_do_not_drift_with_the_position() -> None:
    """A query and a key 3 apart score the same at position 3 and at 4,003, up to bf16 rounding of the heads."""
    rotary = Rotary(dataclasses.replace(tiny_target("qwen3").spec.shape, head_dim=64, rope=Rope(1e6))).to(
        torch.bfloat16
    )
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 64, generator=generator).to(torch.bfloat16) for _ in range(2))
    scores = []
    for start in (0, 4000):
        tables = [rotary(torch.tensor([start + offset])) for offset in (3, 0)]
        rotated = [rotate(x, table).float() for x, table in zip((query, key), tables, strict=True)]
        scores.append(float((rotated[0] * rotated[1]).sum()))
    assert scores[1] == pytest.approx(scores[0], abs=0.15)
    rounded = rotary._inv_freq.to(torch.bfloat16).float()
    assert ((4000 * rounded).cos() - (4000 * rotary._inv_freq).cos()).abs().max() > 0.5  # what the test guards against


def test_llama3_table_is_that_of_transformers() -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    target = tiny_target("llama", rope_parameters=parameters)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters=parameters, max_position_embeddings=512
    )
    positions = torch.arange(300)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    mine = tiny_draft("dflash", target).rotary(positions)
    torch.testing.assert_close(mine[0], cos)
    torch.testing.assert_close(mine[1], sin)


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_bf16_loss_is_near_fp32(algorithm: str) -> None:
    model, batch = tiny_draft(algorithm, tiny_target("qwen3")), random_batch([60, 41])
    exact = float(model(batch).loss().detach())
    model.to(torch.bfloat16)
    assert float(model(batch.to("cpu", torch.bfloat16)).loss().detach()) == pytest.approx(exact, rel=0.02)


def test_a_part_of_a_head_is_turned_as_transformers_turns_it() -> None:
    """Qwen3.5: the first quarter, as a head of that size; the rest stays."""
    target = tiny_target("qwen3_5", head_dim=16, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25})
    positions, heads = torch.arange(40)[None], torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = target.decoder.rotary_emb(heads, positions)
    table = Rotary(target.spec.shape)(positions)
    torch.testing.assert_close(table[0], cos)
    mine = rotate(heads, table)
    theirs, _ = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(mine[..., 4:], heads[..., 4:])
