"""The three objectives written the plain way: the side-by-side baseline of bench_train_step.

All slots at full price, target logits per slot, and, as in the published code, the acceptance rates of the log line
from both distributions, materialised.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.algorithms.block_plan import draw_anchors
from deepspec.algorithms.eagle3 import supervised_slots
from deepspec.batch import Batch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from plain_losses import plain_head_terms, supervised_slots_NK


def plain_block_loss(model: Any, batch: Batch) -> Tensor:
    """DFlash or DSpark at batch 1: every slot's logits, target logits per slot, one attention mask over everything."""
    config = model.config
    K = config.block_size
    drawn = draw_anchors(batch.supervision, config.num_anchors)[0]
    anchors = torch.zeros(config.num_anchors, dtype=torch.int64)
    anchors[: len(drawn)] = drawn
    supervised = supervised_slots_NK(batch.supervision.loss_mask[0], int(batch.supervision.lengths[0]), anchors, K)
    supervised[len(drawn) :] = False
    anchors, supervised = anchors.to(model.device), supervised.to(model.device)
    S, step_K = batch.input_ids.shape[1], torch.arange(K, device=model.device)
    hidden = model.train_slots(batch.features, batch.input_ids, anchors[None], S)[0]  # [N, K, D]
    positions = (anchors[:, None] + step_K).clamp_max(S - 1)
    labels = batch.input_ids[0, (positions + 1).clamp_max(S - 1)]
    weights = torch.exp(-step_K / (config.loss_decay_gamma or math.inf)).expand_as(labels) * supervised
    logits = model.frozen.logits(hidden)
    embedded = None
    if model.markov_head is not None:
        embedded = model.markov_head.markov_w1(batch.input_ids[0, positions])
        logits = logits + model.markov_head.markov_w2(model.markov_head.latents(embedded, hidden))
    target = model.frozen.logits(batch.last_hidden[0, positions])  # type: ignore[index]
    terms = plain_head_terms(logits, target, labels, weights)
    if config.algorithm == "dflash":
        return terms.ce / weights.sum()
    confidence = model.confidence_head(hidden, embedded)
    bce = (weights * F.binary_cross_entropy_with_logits(confidence, terms.accept, reduction="none")).sum()
    total = config.ce_weight * terms.ce + config.l1_weight * terms.l1 + config.confidence_weight * bce
    return total / weights.sum()


def plain_eagle3_loss(model: Any, batch: Batch) -> Tensor:
    """Eagle3 at batch 1: every slot of every step, target logits softmaxed at every step."""
    config = model.config
    S = batch.input_ids.shape[1]
    masks = supervised_slots(batch.supervision, config.ttt_length)[:, 0].to(model.device)  # [T, S]
    every = torch.arange(S, device=model.device)
    hidden = model.train_hidden(batch.features, batch.input_ids, every[None], config.ttt_length, S)[:, 0]
    target = model.frozen.logits(batch.last_hidden[0])  # type: ignore[index]
    total = hidden.new_zeros((), dtype=torch.float32)
    for j in range(config.ttt_length):
        logits = model.frozen.logits(model.norm(hidden[j]))
        shifted = F.pad(target[1 + j :], (0, 0, 0, 1 + j))
        weights = masks[j].float() / int(batch.supervision.lengths[0])
        labels = torch.zeros_like(every)
        total = total + config.step_loss_decay**j * plain_head_terms(logits, shifted, labels, weights).soft_ce
    return total
