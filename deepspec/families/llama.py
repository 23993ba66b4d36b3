"""Llama: as Qwen3 without norms on the heads."""

from deepspec.families.base import Family, copy_config, read_flat_shape

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    class_prefix="Llama",
    draft_model_type="llama",
    read_shape=read_flat_shape,
    draft_config=copy_config,
    thinking_keyword=None,
    plain_layers=("LlamaDecoderLayer",),
)
