"""Qwen3 (dense): q_norm and k_norm on each head, SwiGLU."""

from deepspec.families.base import Family, copy_config, read_flat_shape

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    class_prefix="Qwen3",
    draft_model_type="qwen3",
    read_shape=read_flat_shape,
    draft_config=copy_config,
    head_norm=True,
)
