"""Tiny targets of every family and random batches, for the tests of algorithms, losses and the conformance suite."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch, Supervision
from deepspec.targets.load import Target, spec_from_config

VOCAB, HIDDEN, LAYERS, MASK_TOKEN = 96, 32, 4, 95
ALGORITHMS = tuple(registry.ALGORITHMS)
FAMILIES = tuple(registry.FAMILIES)


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of four tiny layers."""
    common = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gemma4":
        gemma = {
            "global_head_dim": 16,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 5.0,
            "vocab_size_per_layer_input": VOCAB,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        }
        return Gemma4TextConfig(**{**common, **gemma, **changes})
    return (Qwen3Config if family == "qwen3" else LlamaConfig)(**{**common, **changes})


def tiny_target(family: str, **changes: Any) -> Target:
    """A random target of ``family`` in fp32."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    return Target(AutoModelForCausalLM.from_config(config).float(), spec_from_config(config, f"tiny-{family}"))


def draft_section(algorithm: str, **changes: Any) -> dict[str, Any]:
    """A ``draft:`` section of two tiny layers (Eagle3: one) over three target layers, the embedding among them."""
    section: dict[str, Any] = {"target_layers": [-1, 1, 3]}
    if algorithm == "eagle3":
        section |= {"num_layers": 1, "ttt_length": 3}
    else:
        section |= {"num_layers": 2, "block_size": 4, "num_anchors": 5, "mask_token_id": MASK_TOKEN}
    if algorithm == "dspark":
        section |= {"markov_rank": 6}
    return section | changes


def tiny_draft(algorithm: str, target: Target, seed: int = 0, **changes: Any) -> DraftModel:
    """A random draft for ``target``, larger weights than a real initialisation so that every path shows."""
    owner = registry.algorithm(algorithm)
    model = owner.build(owner.parse(draft_section(algorithm, **changes), target.spec), target.spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.attach(target.embed_weight, target.head_weight)
    return model


def random_batch(
    lengths: list[int], num_layers: int = 3, seed: int = 0, share: float = 0.7, dtype: torch.dtype = torch.float32
) -> Batch:
    """Random tokens and hidden states; answers are random runs covering about ``share`` of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths)
    inside = torch.arange(S) < torch.tensor(lengths)[:, None]
    runs = (torch.rand(B, (S + 3) // 4, generator=generator) < share).repeat_interleave(4, dim=1)[:, :S]
    tokens = torch.randint(3, VOCAB - 1, (B, S), generator=generator) * inside
    features = torch.randn(B, S, num_layers * HIDDEN, generator=generator) * inside[..., None]
    last = torch.randn(B, S, HIDDEN, generator=generator) * inside[..., None]
    supervision = Supervision(runs & inside, torch.tensor(lengths), tuple(range(10, 10 + B)), seed=3, epoch=1)
    return Batch(supervision, tokens, features.to(dtype), last.to(dtype))
