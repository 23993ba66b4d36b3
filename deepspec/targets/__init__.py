"""Targets: the frozen LLMs that drafts are trained for."""

from deepspec.targets.capture import TargetOutput
from deepspec.targets.ends import TargetEnds, load_target_ends
from deepspec.targets.load import Target, TargetSpec, load_spec, load_target, load_tokenizer

__all__ = [
    "Target",
    "TargetEnds",
    "TargetOutput",
    "TargetSpec",
    "load_spec",
    "load_target",
    "load_target_ends",
    "load_tokenizer",
]
