"""Targets: the frozen LLMs that drafts are trained for."""

from deepspec.targets.capture import TargetOutput
from deepspec.targets.load import (
    Target,
    TargetEmbeddings,
    TargetSpec,
    load_spec,
    load_target,
    load_target_embeddings,
    load_tokenizer,
)

load_target_ends = load_target_embeddings  # the earlier name, for scripts that use it

__all__ = [
    "Target",
    "TargetEmbeddings",
    "TargetOutput",
    "TargetSpec",
    "load_spec",
    "load_target",
    "load_target_embeddings",
    "load_target_ends",
    "load_tokenizer",
]
