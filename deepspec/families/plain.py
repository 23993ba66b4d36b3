"""The layers of a draft whose family is not its target's own: sizes from the target, parts from the family.

A target of no family here (gpt-oss, DeepSeek, Mistral, ...) gets Llama-like layers: grouped attention over full heads
with a rotary embedding, and one gated MLP. :func:`plain_config` states them as Llama's config does, whatever the target
calls its own sizes; ``Family.from_plain`` puts them into the family's words; ``draft.layers`` of a recipe changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from deepspec import registry
from deepspec.errors import RecipeError, nearest
from deepspec.families.base import FIXED_ROPES, Family, Shape

# names under which configs state a size; the first that is stated counts
EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon", "norm_eps")
ACTIVATION = ("hidden_act", "hidden_activation")
DENSE = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
EXPERT = ("moe_intermediate_size", "expert_ffn_hidden_size", *DENSE)
ACTIVE = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size")
COPIED = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id",
          "initializer_range")  # fmt: skip
GATED_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "swish")  # of a gated MLP that engines have
TURNED = ("partial_rotary_factor",)
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # kind -> keys it needs, keys it may have
    "default": ((), TURNED),
    "proportional": ((), TURNED),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
}  # fmt: skip
MOST_KV_HEADS, MAX_POSITIONS, THETA = 8, 131_072, 10_000.0  # where the target states none


@dataclass(frozen=True)
class LayerSection:
    """The recipe's ``draft.layers``: what of the draft's layers is not the target's own; a key left out is."""

    family: str | None = None  # a row of deepspec.registry.FAMILIES; null: the target's, else Llama-like
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None  # of the MLP
    rope: dict[str, Any] | None = None  # rope_parameters as transformers has them; rope_theta left out: the target's

    def __post_init__(self) -> None:
        if self.family is not None and self.family not in registry.FAMILIES:
            remedy = nearest(self.family, registry.FAMILIES)
            raise RecipeError("unknown family", key="family", found=self.family, remedy=remedy)
        for name in ("num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError("value out of range", key=name, found=value, wanted="at least 1, or null")
        if self.head_dim is not None and self.head_dim % 2:
            raise RecipeError("value out of range", key="head_dim", found=self.head_dim, wanted="an even number")
        if self.rope is not None:
            _check_rope(self.rope)

    @property
    def sizes(self) -> dict[str, Any]:
        """What it states, by the names of Llama's config."""
        names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "rope": "rope_parameters"}
        stated = {names.get(one.name, one.name): getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in stated.items() if value is not None and name != "family"}


def _check_rope(rope: Mapping[str, Any]) -> None:
    """Check that the parameters are all that a kind with fixed frequencies has, and nothing else."""
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        wanted = f"one with fixed frequencies: {', '.join(ROPE_KEYS)}"
        raise RecipeError("unknown kind of RoPE", key="rope.rope_type", found=kind, wanted=wanted)
    needed, known = ROPE_KEYS[kind][0], ("rope_type", "rope_theta", *ROPE_KEYS[kind][0], *ROPE_KEYS[kind][1])
    for key, value in rope.items():
        if key not in known:
            raise RecipeError(f"unknown key of a {kind} RoPE", key=f"rope.{key}", remedy=nearest(key, known))
        number = key not in ("rope_type", "truncate")
        if number and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise RecipeError("wrong value", key=f"rope.{key}", found=value, wanted="a number above 0, as 1.0e+6")
    if missing := [key for key in needed if key not in rope]:
        raise RecipeError(f"a {kind} RoPE needs it", key=f"rope.{missing[0]}", wanted="a number above 0")
    if (part := rope.get("partial_rotary_factor", 1.0)) > 1:
        raise RecipeError("value out of range", key="rope.partial_rotary_factor", found=part, wanted="at most 1")


@dataclass(frozen=True)
class DraftLayers:
    """The family of a draft's layers and a config that it reads."""

    family: Family
    config: Mapping[str, Any]

    @property
    def shape(self) -> Shape:
        """Their sizes.

        Raises:
            RecipeError: query heads that are no multiple of the key/value heads.
        """
        shape = self.family.read_shape(self.config)
        if shape.num_heads % shape.num_kv_heads:
            raise RecipeError(
                "every key/value head serves the same number of query heads", key="draft.layers.num_kv_heads",
                found=shape.num_kv_heads, wanted=f"a divisor of {shape.num_heads} (draft.layers.num_heads)",
            )  # fmt: skip
        return shape


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama-like layers of a target's width, as a flat config, from the target's own flat config."""
    copied = {key: config[key] for key in COPIED if config.get(key) is not None}
    heads, kv_heads, head_dim = _heads(config)
    activation = str(_first(config, ACTIVATION) or "silu")
    plain = copied | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": _mlp_width(config),
        "hidden_act": activation if activation in GATED_ACTIVATIONS else "silu",
        "rms_norm_eps": float(_first(config, EPSILON) or 1e-5),
        "max_position_embeddings": int(config.get("max_position_embeddings") or MAX_POSITIONS),
        "rope_parameters": _rope(config),
    }
    if config.get("final_logit_softcapping") is not None:
        plain["final_logit_softcapping"] = config["final_logit_softcapping"]
    return plain


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size); latent attention (MLA) becomes heads of its values' size."""
    hidden = int(config["hidden_size"])
    heads = int(config.get("num_attention_heads") or max(1, hidden // 64))
    if config.get("kv_lora_rank"):
        head_dim = int(config.get("v_head_dim") or 128)
        heads = max(1, hidden // head_dim)
        return heads, max(count for count in range(1, MOST_KV_HEADS + 1) if heads % count == 0), head_dim
    kv_heads = config.get("num_key_value_heads")
    head_dim = int(config.get("head_dim") or max(2, hidden // heads))
    kv_heads = kv_heads if isinstance(kv_heads, int) and kv_heads and heads % kv_heads == 0 else heads
    return heads, kv_heads, head_dim + head_dim % 2


def _mlp_width(config: Mapping[str, Any]) -> int:
    """Of a dense MLP; of a model with experts the width that a token passes through, shared experts included."""
    dense = _first(config, DENSE)
    active = _first(config, ACTIVE)
    experts = _first(config, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    kinds = config.get("layers_block_type") or config.get("layer_types") or ()
    if "mlp" in kinds and "moe" not in kinds:  # its layers say that there are none, whatever sizes it states
        active = None
    if isinstance(active, int) and isinstance(experts, int) and experts > 1:
        width = _first(config, EXPERT)
        shared = _first(config, SHARED) or int(config.get("n_shared_experts") or 0) * int(width)
        return active * int(width) + int(shared)
    if isinstance(dense, list | tuple):
        dense = max(dense)
    return int(dense or 4 * int(config["hidden_size"]))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The target's rotary embedding over complete heads: of its full-attention layers where kinds differ."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(given.get("full_attention"), Mapping):
        given = given["full_attention"]
    kept = {key: value for key, value in given.items() if key != "partial_rotary_factor" and value is not None}
    kind = str(kept.get("rope_type") or kept.get("type") or "default")
    theta = float(kept.get("rope_theta") or config.get("rope_theta") or THETA)
    if kind in ("default", "proportional") or kind not in FIXED_ROPES:
        return {"rope_type": "default", "rope_theta": theta}
    return {**{key: value for key, value in kept.items() if not isinstance(value, Mapping)}, "rope_theta": theta}
