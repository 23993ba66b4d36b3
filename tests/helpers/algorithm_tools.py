"""Tiny targets of every family and random batches, for the tests of algorithms, losses and decoding."""

from __future__ import annotations

from typing import Any

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.targets.load import Target
from deepspec.testing import tiny
from deepspec.testing.tiny import HIDDEN, LAYERS, VOCAB, padded, random_batch, rows_of, tiny_config, tiny_target

__all__ = ["HIDDEN", "LAYERS", "VOCAB", "padded", "random_batch", "rows_of", "tiny_config", "tiny_target"]

MASK_TOKEN = 95
ALGORITHMS = tuple(registry.ALGORITHMS)
FAMILIES = tuple(registry.FAMILIES)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def draft_section(algorithm: str, **changes: Any) -> dict[str, Any]:
    """The algorithm's tiny ``draft:`` section; a block drafter's mask token is one that no random batch holds."""
    section = tiny.tiny_section(algorithm)
    return section | ({"mask_token_id": MASK_TOKEN} if "mask_token_id" in section else {}) | changes


def tiny_draft(algorithm: str, target: Target, seed: int = 0, **changes: Any) -> DraftModel:
    """A random draft of such a section."""
    return tiny.tiny_draft(draft_section(algorithm, **changes), algorithm, target, seed)
