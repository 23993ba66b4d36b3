"""Tiny drafts of every kind, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from algorithm_tools import tiny_draft, tiny_target

from deepspec.drafts import FROZEN, save_draft

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {}),
    "eagle3-reduced": ("eagle3", {"draft_vocab_size": 20}),
    "eagle3-norms": ("eagle3", {"fc_norm": True, "norm_output": True, "norm_before_residual": True}),
    "p_eagle": ("p_eagle", {}),
    "dflash": ("dflash", {}),
    "dflash-k-1": ("dflash", {"sample_from_anchor": False}),
    "dflash-reduced": ("dflash", {"draft_vocab_size": 20}),
    "dspark": ("dspark", {}),
    "dspark-reduced": ("dspark", {"draft_vocab_size": 20}),
    "dspark-k-1": ("dspark", {"sample_from_anchor": False}),
    "dspark-gated": ("dspark", {"markov_head": "gated"}),
    "dspark-no-markov": ("dspark", {"markov_rank": 0, "confidence_with_markov": False}),
    "dflash-causal": ("dflash", {"sample_from_anchor": False, "causal": True}),
    "dflash-causal-anchor": ("dflash", {"causal": True}),
    "dflash-window": ("dflash", {"sample_from_anchor": False, "sliding_window": 8, "full_layers": [1]}),
    "dflash2": ("dflash2", {}),
    "dflash2-anchor": ("dflash2", {"sample_from_anchor": True}),
    "dflash2-causal": ("dflash2", {"causal": True, "sliding_window": 8}),
    "dflash2-reduced": ("dflash2", {"draft_vocab_size": 20}),
    "dspark-no-confidence": ("dspark", {"confidence_head": False, "confidence_with_markov": False}),
}
LAYERS = [0, 1, 2]  # without the embedding and the last layer, which SGLang does not hand out


def made(folder: Path, kind: str, family: str = "qwen3", frozen: bool = True) -> tuple[Any, Any, Path]:
    """(target, model, draft folder) of a tiny draft, its loss weights and all."""
    target = tiny_target(family)
    algorithm, changes = KINDS[kind]
    model = tiny_draft(algorithm, target, target_layers=LAYERS, **changes).eval()
    if model.config.draft_vocab_size:
        model.set_draft_vocab(torch.randperm(96, generator=torch.Generator().manual_seed(0))[:20].sort().values)
    state = dict(model.state_dict())
    if frozen:
        state |= dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    config = model.algorithm.config_json(model.config, target.spec)
    save_draft(folder / "ours", state, config, {"step": 3, "total_steps": 4, "seed": 1}, "name: tiny\n")
    return target, model, folder / "ours"
