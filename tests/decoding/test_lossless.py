"""Real drafts of every algorithm over a tiny vocabulary at T = 1: the joint distribution of outputs is the target's."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_tools import tiny_draft, tiny_target
from decoding_tools import chi_square, exact_joint

from deepspec import registry
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.decoding.scheduler import Policy, StepCosts, Threshold, Throughput

VOCAB, SAMPLES, ROWS, LENGTH = 5, 4_000, 200, 3
PROMPT = (1, 3, 2, 4)
COSTS = StepCosts({ROWS: (np.array([1.0, 5.0]) * ROWS, np.array([1.0, 1.5]))})
NORMS = {"fc_norm": True, "norm_output": True, "norm_before_residual": True}
CASES: dict[str, tuple[str, Policy | None, dict[str, Any]]] = {
    "eagle3": ("eagle3", None, {}),
    "eagle3, norms": ("eagle3", None, NORMS),
    "p_eagle": ("p_eagle", None, {}),
    "dflash": ("dflash", None, {}),
    "dflash, causal": ("dflash", None, {"causal": True, "sliding_window": 4}),
    "dflash2": ("dflash2", None, {"selector_top_k": 3}),
    "dspark": ("dspark", None, {}),
    "mtp": ("mtp", None, {}),
    "dspark, threshold": ("dspark", Threshold(0.5), {}),
    "dspark, scheduler": ("dspark", Throughput(COSTS), {}),
}


QUICK = ("eagle3", "dflash", "dflash2", "dspark", "dspark, scheduler")


@pytest.mark.parametrize("case", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in CASES])
def test_joint_distribution_of_real_drafts(case: str) -> None:
    algorithm, policy, changes = CASES[case]
    sizes = {"vocab_size": VOCAB, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}
    target = tiny_target("qwen3", **sizes, pad_token_id=None)
    if "mask_token_id" in registry.algorithm(algorithm).tiny_section:
        changes = {"mask_token_id": 0, **changes}
    draft = tiny_draft(algorithm, target, seed=1, **changes)
    if draft.algorithm.name == "dspark":
        with torch.no_grad():  # confidences on both sides of the threshold
            draft.confidence_head.proj.weight.mul_(6)
    drafter = draft.algorithm.drafter(draft, ROWS, 16)
    decoder = Decoder(target, drafter, DecodeSettings(1.0, max_new_tokens=LENGTH, seed=5), ROWS, policy)
    counts: dict[tuple[int, ...], int] = {}
    for one in decoder.stream(deque(DecodeRequest(PROMPT, number) for number in range(SAMPLES))):
        counts[tuple(one.output_ids)] = counts.get(tuple(one.output_ids), 0) + 1
    assert chi_square(counts, exact_joint(target, list(PROMPT), LENGTH, 1.0)) > 1e-3
    assert chi_square(counts, exact_joint(target, list(PROMPT), LENGTH, 0.8)) < 1e-4  # the test can tell
    sent = decoder.clock.verified / decoder.clock.row_rounds - 1
    drafted = drafter.max_draft
    assert sent == drafted if policy is None else 0.1 < sent < drafted - 0.1
