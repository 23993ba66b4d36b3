"""Qwen3.5: as Qwen3 with a gate on each head, rotary embedding of a part of each head, and norms of 1 + weight.

Three of four of its layers are linear attention; a draft's are of the full-attention kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepspec.families.base import Family, Shape, copy_config, read_flat_shape

_PARTIAL = 0.25  # of a head that is turned, where a config is silent
_LINEAR = (
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The :class:`Shape` of the full-attention layers of a Qwen3.5 text config."""
    shape, stated = read_flat_shape(config), config.get("rope_parameters") or {}
    partial = stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or _PARTIAL
    return replace(shape, rope=replace(shape.rope, partial_factor=float(partial)))


def draft_config(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """config.json of a draft: the target's text config without its linear attention."""
    return copy_config(config, num_layers, drop=_LINEAR)


QWEN3_5 = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    expert_types=("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
    class_prefix="Qwen3_5",
    draft_model_type="qwen3_5_text",
    read_shape=read_shape,
    draft_config=draft_config,
    thinking_keyword="enable_thinking",
    head_norm=True,
    gated=True,
    norm_offset=1.0,
    tiny_config={
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5},
    },
)
