"""Gemma4 (the text part of gemma4 and gemma4_unified).

A draft's layers are all of the full-attention kind: the global head size and, where keys serve as values (k_eq_v),
the global number of key/value heads. transformers 5.10 wrote ``global_head_dim`` and ``num_global_key_value_heads``;
later versions write them as overrides in ``per_layer_config``. Both are read; both old names are written to drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.families.base import Family, Shape, copy_config, read_common, read_rope

_DEFAULT_GLOBAL_HEAD_DIM = 512  # what transformers assumes where a config is silent


def global_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """(head_dim, num_kv_heads) of the full-attention layers, from the old or the new config fields."""
    head_dim = config.get("global_head_dim")
    kv_heads = config.get("num_global_key_value_heads")
    overrides = config.get("per_layer_config") or {}
    types = config.get("layer_types") or []
    for index, kind in enumerate(types):
        layer = overrides.get(str(index), overrides.get(index)) if kind == "full_attention" else None
        if layer:
            head_dim = head_dim or layer.get("head_dim")
            kv_heads = kv_heads or layer.get("num_key_value_heads")
            break
    if not config.get("attention_k_eq_v"):
        kv_heads = None
    same = config.get("per_layer_config") is not None and config.get("head_dim")  # it lists what differs, and only that
    return int(head_dim or same or _DEFAULT_GLOBAL_HEAD_DIM), int(kv_heads or config["num_key_value_heads"])


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The :class:`Shape` of the full-attention layers of a Gemma4 text config."""
    head_dim, kv_heads = global_heads(config)
    rope = (config.get("rope_parameters") or {}).get("full_attention")
    if rope is None:
        rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    common = read_common(config, "hidden_activation") | {"head_dim": head_dim, "num_kv_heads": kv_heads}
    softcap = config.get("final_logit_softcapping")
    return Shape(
        **common,
        rope=read_rope(rope, 1_000_000.0),
        k_eq_v=bool(config.get("attention_k_eq_v", False)),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(config.get("logit_scale") or 1.0),
    )


def draft_config(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """config.json of a draft: the target's text config with the global head sizes under their old names."""
    head_dim, kv_heads = global_heads(config)
    draft = copy_config(config, num_layers, drop=("per_layer_config",))
    draft.update(
        global_head_dim=head_dim,
        num_global_key_value_heads=kv_heads if config.get("attention_k_eq_v") else None,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        enable_moe_block=False,
    )
    return draft


def from_plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama-like config in Gemma4's fields."""
    rope = {"full_attention": config["rope_parameters"]}
    kept = {key: value for key, value in config.items() if key not in ("hidden_act", "rope_parameters")}
    sizes = {"global_head_dim": config["head_dim"], "attention_k_eq_v": False, "rope_parameters": rope}
    return {**kept, **sizes, "hidden_activation": config["hidden_act"]}


def resized(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A Gemma4 config with other sizes, by Llama's names, of its full-attention layers."""
    changed = {**config, **sizes}
    if "rope_parameters" in sizes:
        changed["rope_parameters"] = {"full_attention": sizes["rope_parameters"]}
    heads = {"global_head_dim": changed["head_dim"], "num_global_key_value_heads": changed["num_key_value_heads"]}
    return changed | heads


GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    class_prefix="Gemma4",
    draft_model_type="gemma4_text",
    read_shape=read_shape,
    draft_config=draft_config,
    thinking_keyword="enable_thinking",
    head_norm=True,
    value_norm=True,
    attention_scale=1.0,
    sandwich=True,
    scaled_embedding=True,
    from_plain=from_plain,
    resized=resized,
    tiny_config={
        "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96, "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
)  # fmt: skip
