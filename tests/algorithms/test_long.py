"""Steps on long conversations: what bounds their memory changes neither loss nor gradient, and 128k tokens fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import bench_long
import pytest
import torch
from algorithm_tools import random_batch, tiny_draft, tiny_target

from deepspec.batch import Batch
from deepspec.nn import features
from deepspec.nn.cpu import two_part

DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dspark": ("dspark", {"num_anchors": 40}),
    "window": ("dflash", {"num_anchors": 40, "num_layers": 2, "sliding_window": 70, "full_layers": [1]}),
    "eagle3": ("eagle3", {"num_layers": 2}),
    "eagle3 normed": ("eagle3", {"fc_norm": True, "norm_output": True}),
    "p_eagle": ("p_eagle", {}),
    "mtp": ("mtp", {}),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and slices that a short conversation has several of."""
    monkeypatch.setattr(two_part, "_TILE_KEYS", 48)
    monkeypatch.setattr(features, "_ROWS", 100)


def gradients(model: Any, batch: Batch) -> list[torch.Tensor]:
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(batch).loss()
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("draft", DRAFTS)
def test_tiles_slices_and_recomputation_equal_the_dense_step(draft: str) -> None:
    algorithm, changes = DRAFTS[draft]
    if algorithm == "mtp":
        changes = {"target_layers": [4]}
    model: Any = tiny_draft(algorithm, tiny_target("qwen3"), **changes)
    batch = random_batch([330, 257], len(model.config.target_layers), dtype=torch.bfloat16)
    model.activation_checkpointing = True
    found = gradients(model, batch)
    model.activation_checkpointing, model.attention = False, "sdpa"
    wanted = gradients(model, replace(batch, features=batch.features.float()))
    assert len(found) == len(wanted) > 5
    for fast, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5 * float(plain.abs().max()), rtol=2e-4)


def test_features_are_never_widened_as_a_whole() -> None:
    batch = random_batch([9], dtype=torch.bfloat16)
    assert batch.to("cpu", torch.float32).features.dtype == torch.bfloat16
    assert random_batch([9]).to("cpu", torch.bfloat16).features.dtype == torch.bfloat16


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
@pytest.mark.slow
def test_a_step_on_128k_tokens_fits_in_a_gigabyte(algorithm: str) -> None:
    found = bench_long.in_process(algorithm, 131_072)
    assert math.isfinite(found["loss"])
    assert 50 < found["megabytes"] < 1024  # the scores of its slots over its tokens, in one piece: 2 GB a head
