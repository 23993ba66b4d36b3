"""Tiny configs of model types of transformers: what the suite of targets runs on.

``python tests/helpers/model_types.py`` prints the table of docs/targets.md: how a tiny random model of each is decoded.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {  # DeepSeek's attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {  # Qwen's gated delta net
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}

TYPES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
    "gpt_oss": {**EXPERTS, **WINDOWED},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "minimax_m2": EXPERTS,
    "mistral": {"sliding_window": 6},
    "ministral": WINDOWED,
    "mixtral": EXPERTS,
    "gemma": {},
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **WINDOWED, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96, "final_logit_softcapping": 5.0,
    },
    "llama": {},
    "llama4_text": {
        **EXPERTS, "attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
        "no_rope_layers": [1, 0, 1, 0], "layer_types": ["chunked_attention", "full_attention"] * 2,
        "moe_layers": [1, 3],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 6},
    "phimoe": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWED,
    "olmoe": EXPERTS,
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {**EXPERTS, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoehybrid": {
        **EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 24,
        "logits_scaling": 2.0, "embedding_multiplier": 3.0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "conv_kernel": 4, "chunk_size": 8,
    },
    "falcon_h1": {**MAMBA, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "mamba_d_ssm": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "jamba": {**EXPERTS, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**WINDOWED, "logit_scale": 0.25},
    "exaone4": WINDOWED,
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "kimi_linear": {
        **LATENT, "num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4, "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16,
    },
    "glm4_moe_lite": LATENT,
    "ministral3": {},
    "apertus": {},
    "arcee": {},
    "helium": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "nanochat": {},
    "hyperclovax": {"logits_scaling": 2.0},
    "exaone_moe": {
        **EXPERTS, **WINDOWED, "n_routed_experts": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    },
    "vaultgemma": {**WINDOWED, "query_pre_attn_scalar": 8},
    "mimo_v2_flash": {
        **EXPERTS, **WINDOWED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 8,
    },
    "olmo_hybrid": LINEAR,
    "flex_olmo": EXPERTS,
    "cwm": WINDOWED,
    "diffllama": {},
    "persimmon": {},
    "jais2": {},
}  # fmt: skip
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_heads": 2,
    "image_size": 28, "patch_size": 14, "depth": 1, "out_hidden_size": 32, "vision_output_dim": 16,
    "projector_input_dim": 16, "projector_output_dim": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [],
}  # fmt: skip
IMAGE_TEXT = {  # an image-text type -> the type of its text part
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text", "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text", "qwen3_vl": "qwen3_vl_text",
}  # fmt: skip


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a model type."""
    if model_type in IMAGE_TEXT:
        kind = IMAGE_TEXT[model_type]
        text = {**SIZES, **TYPES.get(kind, {}), **changes, "model_type": kind}
        return AutoConfig.for_model(model_type, text_config=text, vision_config=SMALL_VISION, tie_word_embeddings=False)
    return AutoConfig.for_model(model_type, **{**SIZES, **TYPES[model_type], **changes})


def table(names: list[str]) -> list[str]:
    """The rows of the table: type, text part of an image-text type, decoding path, why."""
    from deepspec.decoding.paths import decoding_path
    from deepspec.targets.adaptor import auto_class
    from deepspec.targets.load import Target, spec_from_config

    rows = []
    for name in names:
        torch.manual_seed(0)
        config = config_of(name)
        target = Target(auto_class(config, name).from_config(config).float(), spec_from_config(config, name))
        path = decoding_path(target)
        shown = f"`{name}` (text of images and text)" if name in IMAGE_TEXT else f"`{name}`"
        why = re.sub(r" by [\d.e-]+ of their size", "", path.why)  # which differs with the machine
        rows.append(f"| {shown} | {path.name} | {why} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table(sorted({*TYPES, *IMAGE_TEXT}))))
