"""The learning rate: linear warm-up, then cosine decay to 0; no step is wasted on a rate of 0."""

from __future__ import annotations

import math


def lr_factor(step: int, total: int, warmup_ratio: float) -> float:
    """The share of the peak rate at optimizer step ``step`` (0-based) of ``total``.

    With W = ceil(warmup_ratio * total): (step + 1) / W while step < W, then a half cosine that starts at 1 in step W
    and would reach 0 in step ``total``, one after the last. 0 from ``total`` on. A pure function of the step: a resumed
    run needs no state for it, and an extended run has the rate of its new horizon.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
