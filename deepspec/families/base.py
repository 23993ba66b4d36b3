"""What a family of models is: a table of facts, no code of its own.

Qwen3, Llama and Gemma4 differ in a handful of parts (head norms, residual arrangement, softcap, embedding scale). A
:class:`Family` states them; ``deepspec.nn`` builds draft layers from them and ``deepspec.targets`` finds its way
through a target with them. Adding a family is one file with one table and one registry row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the base, the kind of frequency table and its parameters."""

    theta: float
    kind: str = "default"  # "default", "proportional" (Gemma4), or a kind of transformers ("llama3", "yarn", "linear")
    partial_factor: float = 1.0
    parameters: tuple[tuple[str, Any], ...] = ()  # the remaining rope_parameters, for the kinds of transformers


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture of experts, gated MLPs of which a router gives each token a few."""

    count: int
    per_token: int
    width: int  # inner size of each
    shared_width: int = 0  # of the one that every token passes; 0: there is none
    normalised: bool = True  # a token's weights of its experts sum to 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a draft's layers, read from a model's (text) config."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    activation: str
    rope: Rope
    max_positions: int
    attention_bias: bool = False
    mlp_bias: bool = False
    k_eq_v: bool = False  # values are the un-normed key projection; no v_proj
    softcap: float | None = None  # final logits c * tanh(x / c)
    logit_scale: float = 1.0  # factor of the logits, before the softcap
    experts: Experts | None = None  # in place of the layer's MLP


@dataclass(frozen=True)
class Family:
    """The parts table of one family."""

    name: str
    model_types: tuple[str, ...]  # `model_type` of the targets' configs, text configs included
    class_prefix: str  # of `architectures`; the algorithm's own part comes after it
    draft_model_type: str  # `model_type` of an exported draft's config
    read_shape: Callable[[Mapping[str, Any]], Shape]
    draft_config: Callable[
        [Mapping[str, Any], int], dict[str, Any]
    ]  # (target text config, layers) -> config.json of a draft
    thinking_keyword: str | None  # the chat template's switch; None: the template has none
    head_norm: bool = False  # RMSNorm on each query and key head
    value_norm: bool = False  # scale-free RMSNorm on each value head
    attention_scale: float | None = None  # None: head_dim ** -0.5
    sandwich: bool = False  # norms also after attention and around the MLP, and a layer_scalar buffer
    scaled_embedding: bool = False  # embeddings times sqrt(hidden_size)
    gated: bool = False  # the target's own attention multiplies each head by a gate; only its own heads take that over
    norm_offset: float = 0.0  # what the target's norms add to their stored weights; ours are stored as they multiply
    expert_types: tuple[str, ...] = ()  # `model_type` of targets whose own heads are such layers, with experts
    plain_layers: tuple[str, ...] = ()  # classes of transformers whose forward is that of a draft layer of this family
    tiny_config: Mapping[str, Any] = field(default_factory=dict)  # what a tiny model needs besides its sizes, for tests
    # a Llama-like config (deepspec.families.plain) in this family's own fields; None: they are the same
    from_plain: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    # (a config of this family, sizes by Llama's names) -> the config with them; None: the names are the same
    resized: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None

    def offset_of(self, name: str) -> float:
        """What the target adds to its stored weight ``name``: to those of norms ``norm_offset``."""
        return self.norm_offset if "norm" in name.removesuffix(".weight").rpartition(".")[2] else 0.0

    def added_to(self, other: Family) -> tuple[str, ...] | None:
        """Parts that layers of this family have beside those of ``other``; None where more differs."""
        facts = ("value_norm", "attention_scale", "sandwich", "scaled_embedding", "gated")
        if any(getattr(self, fact) != getattr(other, fact) for fact in facts) or self.head_norm < other.head_norm:
            return None
        return ("q_norm", "k_norm") if self.head_norm > other.head_norm else ()

    def chat_template_kwargs(self, thinking: bool) -> dict[str, bool]:
        """Keyword arguments of the chat template that turn thinking on or off."""
        return {} if self.thinking_keyword is None else {self.thinking_keyword: thinking}

    def embedding_scale(self, hidden_size: int) -> float:
        """The factor between a row of the embedding matrix and the embedding of its token."""
        return float(hidden_size) ** 0.5 if self.scaled_embedding else 1.0


def read_rope(parameters: Mapping[str, Any] | None, default_theta: float) -> Rope:
    """A :class:`Rope` from a config's ``rope_parameters`` (or the older ``rope_scaling``) entry."""
    given = dict(parameters or {})
    theta = float(given.pop("rope_theta", None) or default_theta)
    kind = str(given.pop("rope_type", None) or given.pop("type", None) or "default")
    partial = float(given.pop("partial_rotary_factor", 1.0) or 1.0)
    return Rope(theta, kind, partial, tuple(sorted(given.items())) if kind not in ("default", "proportional") else ())


FIXED_ROPES = ("default", "linear", "yarn", "llama3", "proportional")  # kinds whose frequencies are the model's own


def rope_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kinds of a config's RoPE: one, or one for each kind of layer (Gemma4)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    each = [one for one in given.values() if isinstance(one, Mapping)] or [given]
    return [str(one.get("rope_type") or one.get("type") or "default") for one in each]


def length_dependent_rope(config: Mapping[str, Any]) -> str | None:
    """The kind of a config's RoPE whose frequencies depend on the longest sequence of a forward; None: none does.

    What such a model computes for a sequence depends on those beside it and, with a key/value cache, on when it came.
    """
    return next((kind for kind in rope_kinds(config) if "dynamic" in kind or kind in ("longrope", "su")), None)


def read_common(config: Mapping[str, Any], activation_key: str = "hidden_act") -> dict[str, Any]:
    """The fields of :class:`Shape` that every family spells the same way."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return {
        "hidden_size": hidden,
        "intermediate_size": int(config["intermediate_size"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab_size": int(config["vocab_size"]),
        "norm_eps": float(config["rms_norm_eps"]),
        "activation": str(config[activation_key]),
        "max_positions": int(config["max_position_embeddings"]),
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


DRAFT_EXPERTS = "draft_experts"  # of a config of a draft's layers: they have the experts that it states
EXPERT_KEYS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "norm_topk_prob",
)  # fmt: skip


def read_experts(config: Mapping[str, Any]) -> Experts | None:
    """The experts of the layers of a Qwen-like config; None: it states none, or is of a draft with dense layers."""
    count, local, per_token, width, shared, normalised = map(config.get, EXPERT_KEYS)
    count = count or local  # two names of one thing
    if not (config.get(DRAFT_EXPERTS) and count and per_token and width):
        return None
    return Experts(int(count), int(per_token), int(width), int(shared or 0), normalised is not False)


def read_flat_shape(config: Mapping[str, Any]) -> Shape:
    """The :class:`Shape` of a Llama-like flat config (Llama, Qwen3)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    theta = float(config.get("rope_theta") or 10_000.0)
    softcap, scale = config.get("final_logit_softcapping"), config.get("logit_scale")
    return Shape(
        **read_common(config),
        rope=read_rope(rope, theta),
        softcap=None if softcap is None else float(softcap),
        logit_scale=1.0 if scale is None else float(scale),
        experts=read_experts(config),
    )


def copy_config(config: Mapping[str, Any], num_layers: int, drop: tuple[str, ...] = ()) -> dict[str, Any]:
    """A draft's config.json from its target's text config: the same sizes, full attention, ``num_layers`` layers.

    ``dtype`` and ``architectures`` are set by the writer; ``drop`` names further fields that describe only the target.
    """
    left_out = {"architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path", *drop}
    draft = {key: value for key, value in config.items() if key not in left_out}
    draft.update(
        num_hidden_layers=num_layers,
        num_target_layers=int(config["num_hidden_layers"]),
        layer_types=["full_attention"] * num_layers,
        tie_word_embeddings=False,
    )
    return draft
