"""The recipes of further targets at the targets' real sizes, on the meta device.

Sizes are those of the targets' own configs, as far as a draft depends on them; SOURCES says where each was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from deepspec import registry
from deepspec.recipe import load_recipe
from deepspec.targets.load import TargetSpec, spec_from_config

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
          "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131_072}  # fmt: skip
GPT_OSS = {  # the larger one's are the defaults of transformers' class
    "model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
                        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "gpt_oss_20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt_oss_120b": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "glm4_5_air": {
        "model_type": "glm4_moe", "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 10_944,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "attention_bias": True, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5},
    },
    "llama3_1_8b": LLAMA3 | {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama3_3_70b": LLAMA3 | {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "gemma3_27b": {
        "model_type": "gemma3",
        "text_config": {
            "vocab_size": 262_208, "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
            "query_pre_attn_scalar": 168,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    },
    "mistral_small_24b": {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral", "vocab_size": 131_072, "hidden_size": 5120, "intermediate_size": 32_768,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "sliding_window": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
        },
    },
    "deepseek_v3": {  # sizes: the defaults of transformers' class, stated
        "model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "v_head_dim": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "max_position_embeddings": 163_840,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "beta_fast": 32.0,
                            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                            "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
SOURCES = {  # of the sizes; of the mask token
    "qwen3_30b_a3b": ("slime, scripts/models/qwen3-30B-A3B.sh", "that of the published Qwen3 drafts: one tokenizer"),
    "gpt_oss_20b": ("hf.co/keras/gpt_oss_20b_en, task.json", "config.json of z-lab/gpt-oss-20b-DFlash"),
    "gpt_oss_120b": ("transformers, GptOssConfig", "config.json of z-lab/gpt-oss-120b-DFlash"),
    "glm4_5_air": ("a training log of ms-swift with its Glm4MoeConfig", "hf.co/mlx-community/GLM-4.5V-4bit, tokenizer"),
    "llama3_1_8b": ("hf.co/NaniDAO/Meta-Llama-3.1-8B-Instruct-ablated, config.json", "Llama 3's reserved tokens"),
    "llama3_3_70b": ("ai-dynamo/aiconfigurator, model_configs", "Llama 3's reserved tokens"),
    "gemma3_27b": ("transformers, convert_gemma3_weights.py", "that of the published Gemma 4 drafts: Gemma's <mask>"),
    "mistral_small_24b": ("hf.co/darkc0de/3.2test, config.json", "Tekken's unnamed special tokens"),
    "deepseek_v3": ("transformers, DeepseekV3Config; hf.co/JPAdams12th/dormant-model-2", "DeepSeek's placeholders"),
}


@dataclass(frozen=True)
class Layers:
    """What the layers of a target's drafts must be."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # of a target with experts what a token passes through, but for Qwen3's
    mask: int


LAYERS = {
    "qwen3_30b_a3b": Layers("qwen3", 32, 4, 128, 6144, 151_669),
    "gpt_oss_20b": Layers("llama", 64, 8, 64, 4 * 2880, 200_000),
    "gpt_oss_120b": Layers("llama", 64, 8, 64, 4 * 2880, 200_000),
    "glm4_5_air": Layers("llama", 96, 8, 128, (8 + 1) * 1408, 151_330),
    "llama3_1_8b": Layers("llama", 32, 8, 128, 14_336, 128_002),
    "llama3_3_70b": Layers("llama", 64, 8, 128, 28_672, 128_002),
    "gemma3_27b": Layers("llama", 32, 16, 128, 21_504, 4),
    "mistral_small_24b": Layers("llama", 32, 8, 128, 32_768, 20),
    "deepseek_v3": Layers("llama", 7168 // 128, 8, 128, (8 + 1) * 2048, 128_000),  # of latent attention: values' size
}


def spec_of(target: str) -> TargetSpec:
    """The target as its config states it."""
    return spec_from_config(AutoConfig.for_model(**CONFIGS[target]), target)


@pytest.mark.parametrize("target", CONFIGS)
def test_the_recipes_read_five_layers_evenly_from_the_second_to_the_last_but_two(target: str) -> None:
    depth = spec_of(target).num_layers
    evenly = tuple(round(1 + i * (depth - 4) / 4) for i in range(5))
    for algorithm in ("eagle3", "dflash", "dspark"):
        recipe = load_recipe(RECIPES / f"{algorithm}_{target}.yaml")
        assert recipe.target.layers == recipe.draft.target_layers == evenly
        assert Path(recipe.data.cache[0]).name == target  # one cache of a target for all its drafts


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
@pytest.mark.parametrize("target", CONFIGS)
def test_the_recipes_fit_their_targets_at_real_sizes(algorithm: str, target: str) -> None:
    spec, wanted = spec_of(target), LAYERS[target]
    recipe = load_recipe(RECIPES / f"{algorithm}_{target}.yaml")
    if recipe.target.family is not None:
        assert spec.has_family
        assert spec.family.name == recipe.target.family
    algorithm_ = registry.algorithm(recipe.algorithm)
    algorithm_.check_target(recipe.draft, spec)
    layers = spec.draft_layers(recipe.draft.layers)
    assert layers.family.name == wanted.family
    with torch.device("meta"):
        model = algorithm_.build(recipe.draft, spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    D = spec.hidden_size
    assert shapes["fc.weight"] == (D, 5 * D)
    width = 2 * D if algorithm == "eagle3" else D  # its layer reads the token's embedding beside the features
    for part, heads in (("q", wanted.heads), ("k", wanted.kv_heads), ("v", wanted.kv_heads)):
        assert shapes[f"layers.0.self_attn.{part}_proj.weight"] == (heads * wanted.head_dim, width)
    assert shapes["layers.0.mlp.down_proj.weight"] == (D, wanted.mlp)
    if algorithm != "eagle3":
        assert recipe.draft.mask_token_id == wanted.mask < spec.vocab_size
