"""The complete pipeline on a tiny target; here, for command lines without torch, the types it may have."""

from typing import Any

USUAL_TYPE = "qwen3"
TYPES: dict[str, dict[str, Any]] = {  # transformers' model types, each with what its config has besides the sizes
    USUAL_TYPE: {},
    "qwen3_moe": {  # a token passes through half of its experts, together as wide as the MLP of the usual target
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "norm_topk_prob": True,
    },
    "qwen3_next": {  # every second layer is a gated delta net, a state in place of keys and values
        "layer_types": ["linear_attention", "full_attention"] * 3, "num_experts": 0,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip
