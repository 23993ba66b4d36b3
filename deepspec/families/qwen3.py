"""Qwen3: q_norm and k_norm on each head, SwiGLU. The drafts of a target with experts have dense layers by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.families.base import Family, copy_config, read_flat_shape

# fields of qwen3_moe that do not apply to dense layers
_EXPERTS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "mlp_only_layers", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip


def draft_config(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """config.json of a draft: the target's text config without its experts."""
    return copy_config(config, num_layers, drop=_EXPERTS)


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3", "qwen3_moe"),
    expert_types=("qwen3_moe",),
    class_prefix="Qwen3",
    draft_model_type="qwen3",
    read_shape=read_flat_shape,
    draft_config=draft_config,
    thinking_keyword="enable_thinking",
    head_norm=True,
    plain_layers=("Qwen3DecoderLayer",),
)
