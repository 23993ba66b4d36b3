"""The reduced vocabulary of a draft: the most frequent answer tokens of the training data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspec.sources.base import FeatureSource


def frequent_tokens(source: FeatureSource, vocab_size: int, config: Any) -> Tensor:
    """The ``config.draft_vocab_size`` most frequent supervised tokens, [V'] int64 ascending; ties go to the lower id.

    Every rank counts the same data and so takes the same tokens. Reads token ids and masks, no hidden states.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for number in range(len(source.lengths)):
        counts += np.bincount(source.tokens(number)[source.loss_mask(number)], minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")[: config.draft_vocab_size]
    return torch.from_numpy(np.sort(order))
