"""Numbers from rounds: accepted length with its confidence interval, acceptance by position, verify rate.

A round is stored as a row of integers (sent, length, accepted, committed, emitted); see ``deepspec.decoding.records``.
Accepted length counts the token that the target adds itself, and only tokens inside the output: a round that the limit
cut counts what it added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000


def summarise(samples: Sequence[Mapping[str, Any]], slots: int) -> dict[str, Any]:
    """The measures of one task at one temperature, from its rows of results.jsonl.

    Args:
        samples: rows with ``rounds`` (a list of [sent, length, accepted, committed, emitted]) and ``new_tokens``.
        slots: K of the draft.
    """
    rounds = [np.array(row["rounds"], dtype=np.int64).reshape(-1, 5) for row in samples]
    every = np.concatenate(rounds) if rounds else np.zeros((0, 5), dtype=np.int64)
    low, high = bootstrap([one[:, 4].sum() for one in rounds], [len(one) for one in rounds])
    return {
        "samples": len(samples),
        "rounds": len(every),
        "new_tokens": int(sum(row["new_tokens"] for row in samples)),
        "accepted_length": ratio(every[:, 4].sum(), len(every)),
        "accepted_length_low": low,
        "accepted_length_high": high,
        "accepted_length_published": ratio(every[:, 3].sum(), len(every)),  # tokens past the limit included
        "verified_length": ratio(every[:, 1].sum(), len(every)),
        "verify_rate": ratio(every[:, 2].sum(), every[:, 1].sum()),  # of the drafted tokens verified, those accepted
        **by_position(every, slots),
        "stopped": ratio(sum(row["finish"] == "stop" for row in samples), len(samples)),
    }


def by_position(rounds: np.ndarray, slots: int) -> dict[str, list[float]]:
    """Acceptance of slot k given that it was reached, and of the whole prefix up to k; over rounds that verified k.

    Args:
        rounds: [N, 5].
        slots: K.
    """
    length, accepted = rounds[:, 1], rounds[:, 2]
    conditional, prefix = [], []
    for slot in range(slots):
        verified = length > slot
        reached = verified & (accepted >= slot)
        conditional.append(ratio((accepted[reached] > slot).sum(), reached.sum()))
        prefix.append(ratio((accepted[verified] > slot).sum(), verified.sum()))
    return {"acceptance_conditional": conditional, "acceptance_prefix": prefix}


def bootstrap(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(numerators) / sum(denominators), resampling prompts (rounds of one prompt are not alike)."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not len(above) or below.sum() == 0:
        return 0.0, 0.0
    draws = np.random.default_rng(seed).integers(len(above), size=(RESAMPLES, len(above)))
    means = above[draws].sum(axis=1) / np.maximum(below[draws].sum(axis=1), 1e-12)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def ratio(above: float, below: float) -> float:
    """above / below; 0 where there is nothing to divide by."""
    return float(above) / float(below) if below else 0.0


def macro(tasks: Sequence[Mapping[str, Any]], key: str) -> float:
    """The mean over tasks, each of the same weight."""
    return ratio(sum(task[key] for task in tasks), len(tasks))
